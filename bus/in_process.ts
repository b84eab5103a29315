import { clearImmediate, setImmediate } from "node:timers";
import type { Bus, BusMessage, BusState, PublishOptions, RequestOptions, Subscription } from "./bus.ts";
import { BusClosedError, NoRespondersError, PayloadTooLargeError, RequestTimeoutError } from "./errors.ts";
import { checkSubject, subjectMatcher } from "./subject.ts";

/** Options of {@linkcode InProcessBus}. */
export interface InProcessBusOptions {
  /**
   * Largest message in bytes.
   *
   * @default {1048576} as NATS
   */
  maxPayload?: number;
  /** Told what handlers throw or reject with. Default: `console.error`. */
  onError?: (error: unknown, subject: string) => void;
}

interface Subscriber {
  readonly matches: (subject: string) => boolean;
  readonly handler: (message: BusMessage) => void;
  live: boolean;
}

interface Delivery {
  readonly to: Subscriber;
  readonly subject: string;
  readonly data: Uint8Array;
  readonly reply: string | undefined;
}

/**
 * The transport within one process. It behaves as NATS with one server does: messages are copied, delivered
 * asynchronously, and in one order that all subscribers agree on. Deliveries run as macrotasks, so that a busy bus never
 * starves timers and sockets.
 *
 * @example
 * ```ts
 * import { InProcessBus } from "./in_process.ts";
 * const bus = new InProcessBus();
 * bus.subscribe("echo", (message) => message.respond(message.data));
 * const answer = await bus.request("echo", new Uint8Array([1, 2]));
 * console.log(answer.data); // Uint8Array(2) [ 1, 2 ]
 * await bus.close();
 * ```
 */
export class InProcessBus implements Bus {
  readonly maxPayload: number;
  readonly #onError: (error: unknown, subject: string) => void;
  readonly #subscribers = new Set<Subscriber>();
  readonly #pending = new Set<(error: Error) => void>();
  #queue: Delivery[] = [];
  #flushers: (() => void)[] = [];
  #immediate: ReturnType<typeof setImmediate> | undefined;
  #inboxes = 0;
  #closed = false;

  constructor(options: InProcessBusOptions = {}) {
    this.maxPayload = options.maxPayload ?? 1 << 20;
    this.#onError = options.onError ?? ((error, subject) => console.error(`handler of ${subject} failed:`, error));
  }

  /** Live subscriptions, pending requests included. */
  get subscriptions(): number {
    return this.#subscribers.size;
  }

  publish(subject: string, data: Uint8Array, options: PublishOptions = {}): void {
    this.#send(subject, data, options.reply);
  }

  subscribe(subject: string, handler: (message: BusMessage) => void): Subscription {
    this.#checkOpen();
    const subscriber: Subscriber = { matches: subjectMatcher(subject), handler, live: true };
    this.#subscribers.add(subscriber);
    return {
      unsubscribe: () => {
        subscriber.live = false;
        this.#subscribers.delete(subscriber);
      },
    };
  }

  request(subject: string, data: Uint8Array, options: RequestOptions = {}): Promise<BusMessage> {
    const { timeoutMs = 5000, signal } = options;
    return new Promise((resolve, reject) => {
      signal?.throwIfAborted();
      const inbox = `_INBOX.${++this.#inboxes}`;
      const settle = (then: () => void) => {
        subscription.unsubscribe();
        clearTimeout(timer);
        signal?.removeEventListener("abort", onAbort);
        this.#pending.delete(fail);
        then();
      };
      const fail = (error: unknown) => settle(() => reject(error));
      const onAbort = () => fail(signal?.reason);
      const subscription = this.subscribe(inbox, (message) => settle(() => resolve(message)));
      const timer = setTimeout(
        () => fail(new RequestTimeoutError(`no answer from ${subject} within ${timeoutMs} ms`)),
        timeoutMs,
      );
      signal?.addEventListener("abort", onAbort);
      this.#pending.add(fail);
      try {
        if (this.#send(subject, data, inbox) === 0) fail(new NoRespondersError(`nobody answers on ${subject}`));
      } catch (error) {
        fail(error);
      }
    });
  }

  get state(): BusState {
    return this.#closed ? "disconnected" : "connected";
  }

  /** Calls nobody: the connection is never lost. */
  watch(): Subscription {
    this.#checkOpen();
    return { unsubscribe: () => {} };
  }

  flush(): Promise<void> {
    if (this.#closed || this.#immediate === undefined) return Promise.resolve();
    return new Promise((resolve) => this.#flushers.push(resolve));
  }

  close(): Promise<void> {
    if (this.#closed) return Promise.resolve();
    this.#closed = true;
    if (this.#immediate !== undefined) clearImmediate(this.#immediate);
    this.#immediate = undefined;
    this.#queue = [];
    for (const fail of [...this.#pending]) fail(new BusClosedError("the bus was closed"));
    for (const subscriber of this.#subscribers) subscriber.live = false;
    this.#subscribers.clear();
    for (const resolve of this.#flushers.splice(0)) resolve();
    return Promise.resolve();
  }

  /** Queues a copy for every subscriber and returns their number. */
  #send(subject: string, data: Uint8Array, reply: string | undefined): number {
    this.#checkOpen();
    checkSubject(subject);
    if (reply !== undefined) checkSubject(reply);
    if (data.byteLength > this.maxPayload) throw new PayloadTooLargeError(subject, data.byteLength, this.maxPayload);
    let receivers = 0;
    for (const to of this.#subscribers) {
      if (!to.matches(subject)) continue;
      this.#queue.push({ to, subject, data: data.slice(), reply });
      receivers++;
    }
    if (receivers > 0 && this.#immediate === undefined) this.#immediate = setImmediate(() => this.#deliver());
    return receivers;
  }

  /** Delivers what is queued now; what handlers publish meanwhile waits for the next round. */
  #deliver(): void {
    const round = this.#queue;
    const flushers = this.#flushers;
    this.#queue = [];
    this.#flushers = [];
    // Set before the handlers run, so that what they publish does not schedule a second round.
    for (const { to, subject, data, reply } of round) {
      if (!to.live) continue;
      const message: BusMessage = {
        subject,
        data,
        ...(reply === undefined ? {} : { reply }),
        respond: (answer) => {
          if (reply !== undefined && !this.#closed) this.publish(reply, answer);
        },
      };
      try {
        const result: unknown = to.handler(message);
        if (result instanceof Promise) result.catch((error: unknown) => this.#report(error, subject));
      } catch (error) {
        this.#report(error, subject);
      }
    }
    this.#immediate = this.#queue.length > 0 && !this.#closed ? setImmediate(() => this.#deliver()) : undefined;
    for (const resolve of flushers) resolve();
    if (this.#immediate === undefined) { for (const resolve of this.#flushers.splice(0)) resolve(); }
  }

  #report(error: unknown, subject: string): void {
    try {
      this.#onError(error, subject);
    } catch { /* a broken reporter must not break the bus either */ }
  }

  #checkOpen(): void {
    if (this.#closed) throw new BusClosedError("the bus is closed");
  }
}
