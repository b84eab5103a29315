import {
  DataBuffer,
  deferred,
  errors,
  extractProtocolMessage,
  INFO,
  NatsConnectionImpl,
  setTransportFactory,
} from "@nats-io/transport-node";
import type { ConnectionOptions, NatsConnection, Server, Transport } from "@nats-io/transport-node";
import { nodeResolveHost, NodeTransport } from "@nats-io/transport-node/lib/node_transport.js";
import type { Socket } from "node:net";
import type { TLSSocket } from "node:tls";
import { LUTRA_VERSION } from "./version.ts";

/**
 * The client's transport takes all listeners off its sockets, between two phases of the connection and at its end. A reset that
 * comes in such a moment has nobody to hear it and would end the process: here somebody always does. That the connection
 * is gone the client learns all the same, from the closed socket or from its time limit.
 */
class GuardedTransport extends NodeTransport {
  override async dial(hp: { hostname: string; port: number }): Promise<Socket> {
    return guard(await super.dial(hp));
  }
  override async tlsFirst(hp: { hostname: string; port: number }): Promise<TLSSocket> {
    return guard(await super.tlsFirst(hp));
  }
  override async startTLS(): Promise<TLSSocket> {
    return guard(await super.startTLS());
  }
}

function guard<T extends Socket>(socket: T): T {
  const ignore = () => {};
  const removeAll = socket.removeAllListeners.bind(socket);
  socket.removeAllListeners = (...events: (string | symbol)[]) => {
    removeAll(...events);
    socket.on("error", ignore);
    return socket;
  };
  return socket.on("error", ignore);
}

/** Bytes read at once: a hidden state is 4 to 32 KiB, a chunk of weights 1 MiB. */
const READ_BYTES = 1 << 17;

/**
 * A connection without TLS over Deno's own sockets; with TLS it is the client's own, over Node's. A token waits for every hop,
 * and Node's streams make a hop half as long again: 0.14 ms became 0.23 (8 KiB between two processes that were asleep, by way of a
 * server, medians).
 */
class DirectTransport implements Transport {
  readonly lang = "lutra";
  readonly version = LUTRA_VERSION;
  /** In its place where there is TLS. */
  #secure: GuardedTransport | undefined;
  #conn: Deno.TcpConn | undefined;
  readonly #dialing = new AbortController();
  /** What came with the server's first line. */
  #first: Uint8Array = new Uint8Array();
  /** Frames that wait for the socket. */
  #frames: Uint8Array[] = [];
  #writing = false;
  #connected = false;
  #done = false;
  closeError?: Error;
  readonly #closed = deferred<void | Error>();

  get isClosed(): boolean {
    return this.#secure?.isClosed ?? this.#done;
  }

  async connect(server: Server, options: ConnectionOptions): Promise<void> {
    if (options.tls === undefined && !(await this.#dial(server))) return;
    if (this.#done) return;
    this.#secure = new GuardedTransport();
    this.#secure.closed().then((error) => this.#tell(error ?? undefined));
    await this.#secure.connect(server, options);
  }

  /** Connects without TLS, or tells that the server wants it. */
  async #dial({ hostname, port }: Server): Promise<boolean> {
    try {
      const conn = await Deno.connect({ hostname, port, signal: this.#dialing.signal });
      this.#conn = conn;
      if (this.#done) this.#drop();
      conn.setNoDelay(true);
      let line = "";
      while (line === "") {
        const chunk = await this.#read(new Uint8Array(READ_BYTES));
        if (chunk === undefined) throw new errors.ConnectionError("the connection was closed");
        this.#first = DataBuffer.concat(this.#first, chunk);
        line = extractProtocolMessage(this.#first);
      }
      const info = INFO.exec(line)?.[1];
      if (info === undefined) throw new errors.ConnectionError("unexpected response from server");
      const { tls_required, tls_available } = JSON.parse(info);
      if (tls_required === true || tls_available === true) {
        this.#drop();
        return true;
      }
      this.#connected = true;
      return false;
    } catch (cause) {
      this.#drop();
      if (cause instanceof Deno.errors.ConnectionRefused) {
        throw new errors.ConnectionError("connection refused", { cause });
      }
      throw cause;
    }
  }

  async #read(into: Uint8Array): Promise<Uint8Array | undefined> {
    const bytes = await this.#conn?.read(into);
    return typeof bytes === "number" ? into.slice(0, bytes) : undefined;
  }

  async *[Symbol.asyncIterator](): AsyncIterableIterator<Uint8Array> {
    if (this.#secure !== undefined) return yield* this.#secure;
    yield this.#first;
    const buffer = new Uint8Array(READ_BYTES);
    while (!this.#done) {
      let chunk: Uint8Array | undefined;
      let error: Error | undefined;
      try {
        chunk = await this.#read(buffer);
      } catch (cause) {
        error = cause as Error;
      }
      if (chunk === undefined) return this.#end(error);
      yield chunk;
    }
  }

  isEncrypted(): boolean {
    return this.#secure?.isEncrypted() ?? false;
  }

  send(frame: Uint8Array): void {
    if (this.#secure !== undefined) return this.#secure.send(frame);
    if (this.#done) return;
    this.#frames.push(frame);
    if (!this.#writing) void this.#write();
  }

  /** Writes all frames. What cannot be written the reader learns, or the client's pings. */
  async #write(): Promise<void> {
    this.#writing = true;
    try {
      for (let frame = this.#frames.shift(); frame !== undefined; frame = this.#frames.shift()) {
        for (let from = 0; from < frame.byteLength;) from += await this.#conn!.write(frame.subarray(from));
      }
    } catch {
      this.#frames = [];
    } finally {
      this.#writing = false;
    }
  }

  async close(error?: Error): Promise<void> {
    if (this.#secure !== undefined) return await this.#secure.close(error);
    if (this.#connected) this.#end(error);
    else this.discard();
  }

  disconnect(): void {
    if (this.#secure !== undefined) return this.#secure.disconnect();
    // At once: to an end that takes nothing any more a write never comes to its end. Who wants all to leave flushes before.
    this.#end(undefined);
  }

  closed(): Promise<void | Error> {
    return this.#closed;
  }

  discard(): void {
    this.#secure?.discard();
    this.#done = true;
    this.#drop();
  }

  #end(error: Error | undefined): void {
    if (this.#done) return;
    this.discard();
    this.#tell(error);
  }

  #tell(error: Error | undefined): void {
    if (error !== undefined) this.closeError = error;
    this.#closed.resolve(error);
  }

  #drop(): void {
    this.#dialing.abort();
    try {
      this.#conn?.close();
    } catch { /* it is closed */ }
    this.#conn = undefined;
  }
}

/** `connect` of the client, over these transports. */
export function connectGuarded(options: ConnectionOptions): Promise<NatsConnection> {
  setTransportFactory({ factory: () => new DirectTransport(), dnsResolveFn: nodeResolveHost });
  return NatsConnectionImpl.connect(options);
}
