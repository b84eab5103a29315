/** A message as a subscriber sees it. */
export interface BusMessage {
  /** The subject it was published to. */
  readonly subject: string;
  /** The subscriber's own copy. May be unaligned in its buffer with some transports. */
  readonly data: Uint8Array;
  /** Where an answer is awaited, if one is. */
  readonly reply?: string;
  /** Publishes `data` to {@linkcode BusMessage.reply}; does nothing when no answer is awaited. */
  respond(data: Uint8Array): void;
}

/** A live subscription. */
export interface Subscription {
  /** Ends it; messages not delivered yet are dropped. Harmless when repeated. */
  unsubscribe(): void;
}

/** Where the bus's server is for a connection beside the bus's own, with the same rights. */
export interface NativeEndpoint {
  readonly hostname: string;
  readonly port: number;
  /**
   * Lines of the NATS protocol that log in and subscribe to `subjects`, which are numbered from 1; the last one is a PING.
   *
   * @param info What the server has said of itself, JSON.
   * @throws {BusConnectError} when the server wants TLS, or `info` is malformed.
   */
  hello(info: string, subjects: readonly string[]): string;
}

/** Options of {@linkcode Bus.publish}. */
export interface PublishOptions {
  /** Subject on which an answer is awaited. */
  reply?: string;
}

/** Options of {@linkcode Bus.request}. */
export interface RequestOptions {
  /**
   * Milliseconds until {@linkcode RequestTimeoutError}.
   *
   * @default {5000}
   */
  timeoutMs?: number;
  /** Ends the wait; the promise rejects with the signal's reason. */
  signal?: AbortSignal;
}

/** Whether the transport reaches the others. Within a process it always does. */
export type BusState = "connected" | "disconnected";

/**
 * Publish/subscribe with NATS semantics: subjects of dot-separated tokens, `*` matches one token and a final `>` the
 * rest. Delivery is asynchronous and at most once. Messages of one publisher arrive in the order they were published.
 */
export interface Bus {
  /** Largest message in bytes. */
  readonly maxPayload: number;
  /**
   * Sends a copy of `data`.
   *
   * @throws {PayloadTooLargeError} when `data` is longer than {@linkcode Bus.maxPayload}.
   * @throws {SubjectError} when the subject is malformed.
   * @throws {BusClosedError} after {@linkcode Bus.close}.
   */
  publish(subject: string, data: Uint8Array, options?: PublishOptions): void;
  /** Calls `handler` for every message whose subject matches. What the handler throws is reported, never propagated. */
  subscribe(subject: string, handler: (message: BusMessage) => void): Subscription;
  /**
   * Publishes with a fresh reply subject and resolves with the first answer.
   *
   * @throws {NoRespondersError} when nobody subscribes to `subject`.
   * @throws {RequestTimeoutError} when no answer comes in time.
   */
  request(subject: string, data: Uint8Array, options?: RequestOptions): Promise<BusMessage>;
  /**
   * Resolves when all that was published before has reached the transport (in process: the handlers).
   *
   * @throws {BusError} when the connection is lost meanwhile.
   */
  flush(): Promise<void>;
  /** How native code may join; absent, or `undefined`, where there is no server, or only one that wants TLS. */
  nativeEndpoint?(): NativeEndpoint | undefined;
  /** Whether it reaches the others now; once closed it never does. */
  readonly state: BusState;
  /**
   * Tells when the connection is lost and when it is there again. Messages published or on their way in between are lost;
   * subscriptions live on.
   */
  watch(handler: (state: BusState) => void): Subscription;
  /** Ends all subscriptions and rejects pending requests. */
  close(): Promise<void>;
}
