import { createInbox, credsAuthenticator, errors as natsErrors, nkeyAuthenticator } from "@nats-io/transport-node";
import type { Authenticator, ConnectionOptions, Msg, NatsConnection, TlsOptions } from "@nats-io/transport-node";
import { z } from "zod";
import type { Bus, BusMessage, BusState, NativeEndpoint, PublishOptions, RequestOptions, Subscription } from "./bus.ts";
import { NatsClusterStore, storesKeys } from "./cluster_store.ts";
import type { ClusterStore, StoreOptions } from "./cluster_store.ts";
import {
  BusClosedError,
  BusConnectError,
  BusError,
  NoRespondersError,
  PayloadTooLargeError,
  RequestTimeoutError,
} from "./errors.ts";
import { connectGuarded } from "./nats_transport.ts";
import { checkSubject, subjectMatcher } from "./subject.ts";
import { LUTRA_VERSION } from "./version.ts";

/** How to reach a NATS server. Secrets are contents, not paths. */
export interface NatsOptions {
  /**
   * `nats://host:4222`, or `tls://…` to insist on TLS; several for a cluster of servers. `nats://token@host` and
   * `nats://user:password@host` bring their own credentials.
   */
  servers: string | readonly string[];
  /** Shown in the server's list of clients. */
  name?: string;
  token?: string;
  user?: string;
  password?: string;
  /** Seed of an nkey, `SU…`. */
  nkeySeed?: string;
  /** A credentials file (JWT and seed). */
  creds?: string;
  /** PEM texts: the authority that signed the server's certificate, and for mutual TLS this client's. */
  tls?: { ca?: string; cert?: string; key?: string };
  /** Milliseconds for the first connection. @default {5000} */
  timeoutMs?: number;
  /** Go on trying when no server answers at first. @default {false} */
  wait?: boolean;
  /**
   * Milliseconds between pings to the server. A connection whose other end is gone without a word counts as lost after
   * two unanswered ones.
   *
   * @default {1000}
   */
  pingIntervalMs?: number;
  /** Told what handlers throw or reject with, and what the server complains of. Default: `console.error`. */
  onError?: (error: unknown, subject: string) => void;
}

interface Pending {
  readonly subject: string;
  readonly settle: (message: BusMessage | undefined, error?: unknown) => void;
}

/** What native code must know of a server's greeting. */
const infoSchema = z.object({
  nonce: z.string().optional(),
  tls_required: z.boolean().default(false),
  tls_available: z.boolean().default(false),
});

const RECONNECT_MS = 200;
const CLOSE_FLUSH_MS = 1000;
const MOST_CHECKED = 256;

/**
 * The transport over a NATS server. Connections that break are made again without end, with all subscriptions; what was
 * published meanwhile is lost, as on any bus (see {@linkcode Bus.watch}). Answers to requests come in on one inbox.
 *
 * @example
 * ```ts ignore
 * const bus = await NatsBus.connect({ servers: "nats://127.0.0.1:4222" });
 * bus.subscribe("echo", (message) => message.respond(message.data));
 * console.log((await bus.request("echo", new Uint8Array([1, 2]))).data);
 * await bus.close();
 * ```
 */
export class NatsBus implements Bus {
  readonly maxPayload: number;
  readonly #nc: NatsConnection;
  readonly #settings: ConnectionOptions;
  readonly #onError: (error: unknown, subject: string) => void;
  readonly #subscriptions = new Set<Subscription>();
  readonly #watchers = new Set<(state: BusState) => void>();
  readonly #pending = new Map<string, Pending>();
  readonly #inbox = createInbox();
  /** Subjects that are well-formed. */
  readonly #checked = new Set<string>();
  #nextInbox = 0;
  #state: BusState = "connected";
  #closing: Promise<void> | undefined;
  readonly #watching: Promise<void>;

  private constructor(
    nc: NatsConnection,
    settings: ConnectionOptions,
    onError: (error: unknown, subject: string) => void,
  ) {
    this.#nc = nc;
    this.#settings = settings;
    this.#onError = onError;
    this.maxPayload = nc.info?.max_payload ?? 1 << 20;
    nc.subscribe(`${this.#inbox}.*`, { callback: (error, message) => this.#onAnswer(error, message) });
    this.#watching = this.#watch();
  }

  /**
   * Connects.
   *
   * @throws {BusConnectError} which says whether the server is absent, refuses the credentials or its certificate is not trusted.
   */
  static async connect(options: NatsOptions): Promise<NatsBus> {
    const { settings, shown } = connectionOptions(options);
    const onError = options.onError ?? ((error, subject) => console.error(`bus ${subject}:`, error));
    let nc: NatsConnection;
    try {
      nc = await connectGuarded(settings);
    } catch (cause) {
      throw new BusConnectError(connectProblem(shown, cause), { cause });
    }
    return new NatsBus(nc, settings, onError);
  }

  /** Live subscriptions, without the inbox of requests. */
  get subscriptions(): number {
    return this.#subscriptions.size;
  }

  get state(): BusState {
    return this.#isClosed ? "disconnected" : this.#state;
  }

  /** Version of the server. */
  get serverVersion(): string {
    return this.#nc.info?.version ?? "unknown";
  }

  /** The store of a cluster; `undefined` where the server has none, see `cluster_store.ts`. */
  store(cluster: string, options?: StoreOptions): ClusterStore | undefined {
    return this.serverHasJetStream && storesKeys(this.serverVersion)
      ? new NatsClusterStore(this.#nc, cluster, options)
      : undefined;
  }

  /** Whether the server says that JetStream is on. */
  get serverHasJetStream(): boolean {
    return this.#nc.info?.jetstream === true;
  }

  nativeEndpoint(): NativeEndpoint | undefined {
    if (this.#isClosed || this.#settings.tls !== undefined) return undefined;
    const { hostname, port } = new URL(`nats://${this.#nc.getServer()}`);
    return {
      hostname: hostname.replace(/^\[|\]$/g, ""), // of an IPv6 address
      port: Number(port),
      hello: (info, subjects) => hello(this.#settings, info, subjects),
    };
  }

  publish(subject: string, data: Uint8Array, options: PublishOptions = {}): void {
    this.#send(subject, data, options.reply);
  }

  subscribe(subject: string, handler: (message: BusMessage) => void): Subscription {
    this.#checkOpen();
    subjectMatcher(subject); // throws when malformed
    let live = true;
    const inner = this.#nc.subscribe(subject, {
      callback: (error, message) => {
        if (!live) return;
        if (error !== null) return this.#report(error, subject);
        this.#call(handler, message);
      },
    });
    const subscription: Subscription = {
      unsubscribe: () => {
        if (!live) return;
        live = false;
        this.#subscriptions.delete(subscription);
        inner.unsubscribe();
      },
    };
    this.#subscriptions.add(subscription);
    return subscription;
  }

  request(subject: string, data: Uint8Array, options: RequestOptions = {}): Promise<BusMessage> {
    const { timeoutMs = 5000, signal } = options;
    return new Promise((resolve, reject) => {
      signal?.throwIfAborted();
      const inbox = `${this.#inbox}.${++this.#nextInbox}`;
      const settle: Pending["settle"] = (message, error) => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", onAbort);
        this.#pending.delete(inbox);
        if (message === undefined) reject(error);
        else resolve(message);
      };
      const onAbort = () => settle(undefined, signal?.reason);
      const timer = setTimeout(
        () => settle(undefined, new RequestTimeoutError(`no answer from ${subject} within ${timeoutMs} ms`)),
        timeoutMs,
      );
      signal?.addEventListener("abort", onAbort);
      this.#pending.set(inbox, { subject, settle });
      try {
        this.#send(subject, data, inbox);
      } catch (error) {
        settle(undefined, error);
      }
    });
  }

  async flush(): Promise<void> {
    if (this.#closing !== undefined) return;
    try {
      await this.#nc.flush();
    } catch (cause) {
      if (this.#closing !== undefined) return;
      throw new BusError("the connection to the NATS server was lost", { cause });
    }
  }

  watch(handler: (state: BusState) => void): Subscription {
    this.#checkOpen();
    this.#watchers.add(handler);
    return { unsubscribe: () => void this.#watchers.delete(handler) };
  }

  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    for (const subscription of [...this.#subscriptions]) subscription.unsubscribe();
    this.#watchers.clear();
    for (const { settle } of [...this.#pending.values()]) settle(undefined, new BusClosedError("the bus was closed"));
    if (this.#state === "connected" && !this.#nc.isClosed()) {
      // What was published before leaves; a server that hangs does not hold up the end.
      let timer: ReturnType<typeof setTimeout> | undefined;
      const patience = new Promise<void>((resolve) => timer = setTimeout(resolve, CLOSE_FLUSH_MS));
      await Promise.race([this.#nc.flush().catch(() => {}), patience]);
      clearTimeout(timer);
    }
    await this.#nc.close();
    await this.#watching;
  }

  #send(subject: string, data: Uint8Array, reply: string | undefined): void {
    this.#checkOpen();
    this.#checkSubject(subject);
    if (reply !== undefined) checkSubject(reply);
    if (data.byteLength > this.maxPayload) throw new PayloadTooLargeError(subject, data.byteLength, this.maxPayload);
    // The client keeps the buffer until it is written; the caller may change it at once.
    this.#nc.publish(subject, new Uint8Array(data), reply === undefined ? {} : { reply });
  }

  /** Tokens go to the same few subjects again and again. */
  #checkSubject(subject: string): void {
    if (this.#checked.has(subject)) return;
    checkSubject(subject);
    if (this.#checked.size >= MOST_CHECKED) this.#checked.clear();
    this.#checked.add(subject);
  }

  /** Hands a message to a handler, whose errors go no further: the client's reader would end with them. */
  #call(handler: (message: BusMessage) => void, message: Msg): void {
    const { subject } = message;
    try {
      const result: unknown = handler(this.#toMessage(message));
      if (result instanceof Promise) result.catch((error: unknown) => this.#report(error, subject));
    } catch (error) {
      this.#report(error, subject);
    }
  }

  #toMessage({ subject, data, reply }: Msg): BusMessage {
    const awaited = reply !== undefined && reply !== "";
    return {
      subject,
      // Not the Buffer that the client gives, whose `slice` copies nothing.
      data: new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
      ...(awaited ? { reply } : {}),
      respond: (answer) => {
        if (awaited && this.#closing === undefined && !this.#nc.isClosed()) this.#send(reply, answer, undefined);
      },
    };
  }

  #onAnswer(error: Error | null, message: Msg): void {
    if (error !== null) return this.#report(error, this.#inbox);
    const pending = this.#pending.get(message.subject);
    if (pending === undefined) return; // too late
    if (message.data.byteLength === 0 && message.headers?.code === 503) {
      pending.settle(undefined, new NoRespondersError(`nobody answers on ${pending.subject}`));
    } else pending.settle(this.#toMessage(message));
  }

  async #watch(): Promise<void> {
    for await (const status of this.#nc.status()) {
      if (status.type === "disconnect") this.#change("disconnected");
      else if (status.type === "reconnect") this.#change("connected");
      else if (status.type === "error") this.#report(status.error, "server");
    }
    const error = await this.#nc.closed();
    if (this.#closing !== undefined) return;
    // The client has given up, as it does when the server refuses its credentials again and again.
    this.#change("disconnected");
    this.#report(error ?? new BusClosedError("the connection was closed"), "server");
  }

  #change(state: BusState): void {
    if (state === this.#state) return;
    this.#state = state;
    for (const watcher of [...this.#watchers]) {
      try {
        watcher(state);
      } catch (error) {
        this.#report(error, "watch");
      }
    }
  }

  #report(error: unknown, subject: string): void {
    try {
      this.#onError(error, subject);
    } catch { /* a broken reporter must not break the bus either */ }
  }

  /** Whether it was closed, or its client has given up. */
  get #isClosed(): boolean {
    return this.#closing !== undefined || this.#nc.isClosed();
  }

  #checkOpen(): void {
    if (this.#isClosed) throw new BusClosedError("the bus is closed");
  }
}

/** The client's options, and the servers as they may be shown: without secrets. */
function connectionOptions(options: NatsOptions): { settings: ConnectionOptions; shown: string } {
  const servers: string[] = [];
  let { token, user, password } = options;
  let insist = false;
  for (const text of [options.servers].flat() as string[]) {
    let url: URL;
    try {
      url = new URL(text.includes("://") ? text : `nats://${text}`);
    } catch (cause) {
      throw new BusConnectError(`${JSON.stringify(text)} is no address of a server: use nats://host:4222`, { cause });
    }
    if (!["nats:", "tls:"].includes(url.protocol) || url.hostname === "") {
      throw new BusConnectError(`${url.protocol}//… is no address of a NATS server: use nats://host:4222`);
    }
    if (url.protocol === "tls:") insist = true;
    if (url.password !== "") [user, password] = [decodeURIComponent(url.username), decodeURIComponent(url.password)];
    else if (url.username !== "") token = decodeURIComponent(url.username);
    servers.push(`${url.hostname}:${url.port === "" ? 4222 : url.port}`);
  }
  const encode = (text: string) => new TextEncoder().encode(text);
  const authenticator = options.creds !== undefined
    ? credsAuthenticator(encode(options.creds))
    : options.nkeySeed !== undefined
    ? nkeyAuthenticator(encode(options.nkeySeed.trim()))
    : undefined;
  const tls: TlsOptions | undefined = options.tls ?? (insist ? {} : undefined);
  const interval = options.pingIntervalMs ?? 1000;
  const settings: ConnectionOptions = {
    servers,
    timeout: options.timeoutMs ?? 5000,
    maxReconnectAttempts: -1,
    reconnectTimeWait: RECONNECT_MS,
    reconnectJitter: RECONNECT_MS / 2,
    reconnectJitterTLS: RECONNECT_MS / 2,
    waitOnFirstConnect: options.wait ?? false,
    pingInterval: interval,
    maxPingOut: 2,
    ignoreClusterUpdates: true, // boards behind other addresses than the server's own stay with the one they were given
    ...(options.name === undefined ? {} : { name: options.name }),
    ...(token === undefined ? {} : { token }),
    ...(user === undefined ? {} : { user }),
    ...(password === undefined ? {} : { pass: password }),
    ...(authenticator === undefined ? {} : { authenticator }),
    ...(tls === undefined ? {} : { tls }),
  };
  return { settings, shown: servers.join(", ") };
}

/** See {@linkcode NativeEndpoint.hello}. */
function hello(settings: ConnectionOptions, info: string, subjects: readonly string[]): string {
  let greeting: z.infer<typeof infoSchema>;
  try {
    greeting = infoSchema.parse(JSON.parse(info));
  } catch (cause) {
    throw new BusConnectError("the server's greeting is malformed", { cause });
  }
  if (greeting.tls_required || greeting.tls_available) throw new BusConnectError("the server offers TLS");
  subjects.forEach(checkSubject);
  const { name, token, user, pass, authenticator } = settings;
  const options = {
    verbose: false,
    pedantic: false,
    protocol: 1,
    lang: "lutra",
    version: LUTRA_VERSION,
    headers: false,
    no_responders: false,
    ...(name === undefined ? {} : { name: `${name} lane` }),
    ...(token === undefined ? {} : { auth_token: token }),
    ...(user === undefined ? {} : { user, pass }),
    ...(authenticator as Authenticator | undefined)?.(greeting.nonce), // `connectionOptions` makes one, no list
  };
  const subscribe = subjects.map((subject, i) => `SUB ${subject} ${i + 1}\r\n`).join("");
  return `CONNECT ${JSON.stringify(options)}\r\n${subscribe}PING\r\n`;
}

function connectProblem(servers: string, cause: unknown): string {
  const reason = cause instanceof Error ? cause.message : String(cause);
  if (cause instanceof natsErrors.AuthorizationError || /authori[sz]ation/i.test(reason)) {
    return `the NATS server at ${servers} refuses these credentials`;
  }
  if (/does not support 'tls'/.test(reason)) return `the NATS server at ${servers} does not offer TLS`;
  if (/certificate|tls|ssl/i.test(reason)) {
    return `no secure connection to the NATS server at ${servers}: ${reason}`;
  }
  return `no NATS server answers at ${servers} (${reason}): is it started, and the port open?`;
}
