import { accessSync, constants, existsSync } from "node:fs";
import { join } from "node:path";
import { BusError } from "./errors.ts";

/** Options of {@linkcode NatsServer.start}. */
export interface NatsServerOptions {
  /** The program. Default: `nats-server` on PATH or where Debian puts it. */
  path?: string;
  /** @default {"127.0.0.1"} */
  host?: string;
  /** 0 takes a free one. @default {0} */
  port?: number;
  /** Clients must bring this token. */
  token?: string;
  /** Whether JetStream is on, with its files in the server's own folder. @default {false} */
  jetstream?: boolean;
  /** Lines added to the configuration, in the server's own language. */
  config?: string;
  /** Milliseconds for the start. @default {10000} */
  timeoutMs?: number;
}

/** A `nats-server` is missing or does not start; the message says what to do. */
export class NatsServerError extends BusError {
  override name = "NatsServerError";
}

const NAME = Deno.build.os === "windows" ? "nats-server.exe" : "nats-server";
/** Debian installs it here, which is not on everybody's PATH. */
const SYSTEM_FOLDERS = ["/usr/sbin", "/usr/local/sbin", "/usr/local/bin"];
const STOP_MS = 3000;

/** Where `nats-server` is: the environment variable `LUTRA_NATS_SERVER`, else on PATH; `undefined` when it is nowhere. */
export function findNatsServer(folders: readonly string[] = []): string | undefined {
  const named = Deno.env.get("LUTRA_NATS_SERVER");
  if (named !== undefined && named !== "") return existsSync(named) ? named : undefined;
  const separator = Deno.build.os === "windows" ? ";" : ":";
  const path = (Deno.env.get("PATH") ?? "").split(separator).filter((folder) => folder !== "");
  for (const folder of [...folders, ...path, ...SYSTEM_FOLDERS]) {
    const file = join(folder, NAME);
    try {
      accessSync(file, constants.X_OK);
      return file;
    } catch { /* not here */ }
  }
  return undefined;
}

/** Waits until its input ends, which it does however this process ends, and kills the server. Signals to all are for others. */
const GUARD = `trap "" INT TERM HUP; cat >/dev/null; kill -9 "$1"`;

/**
 * A `nats-server` of our own, with a configuration made for Lutra: core NATS alone, nothing on disk, messages of up to 1 MiB,
 * and pings often enough that boards whose cable was pulled are noticed. It ends with this process, even one that is killed,
 * where there is a shell that may be run.
 */
export class NatsServer {
  /** `nats://host:port`, with the token. */
  readonly url: string;
  readonly host: string;
  readonly port: number;
  readonly pid: number;
  readonly #child: Deno.ChildProcess;
  readonly #guard: Deno.ChildProcess | undefined;
  readonly #folder: string;
  /** Reads the log to its end. */
  readonly #log: Promise<void>;
  #stopping: Promise<void> | undefined;

  private constructor(
    parts: { child: Deno.ChildProcess; folder: string; log: Promise<void>; host: string; port: number },
    token: string | undefined,
  ) {
    const { child, folder, log, host, port } = parts;
    this.#child = child;
    this.#guard = startGuard(child.pid);
    this.#folder = folder;
    this.#log = log;
    this.host = host;
    this.port = port;
    this.pid = child.pid;
    this.url = `nats://${token === undefined ? "" : `${encodeURIComponent(token)}@`}${reachable(host)}:${port}`;
  }

  /**
   * Starts a server and resolves when it takes connections.
   *
   * @throws {NatsServerError} when there is none, or with what it said when it ended.
   */
  static async start(options: NatsServerOptions = {}): Promise<NatsServer> {
    const path = options.path ?? findNatsServer();
    if (path === undefined) {
      throw new NatsServerError(
        "there is no nats-server on PATH: install it (Debian, Raspberry Pi OS: `sudo apt install nats-server`)",
      );
    }
    const { host = "127.0.0.1", port = 0, token, timeoutMs = 10_000 } = options;
    const folder = await Deno.makeTempDir({ prefix: "lutra-nats-" });
    const file = join(folder, "nats.conf");
    const store = options.jetstream === true
      ? `jetstream { store_dir: ${JSON.stringify(join(folder, "store"))} }\n`
      : "";
    const extra = `${store}${options.config ?? ""}`;
    await Deno.writeTextFile(file, configuration({ host, port, token, extra }), { mode: 0o600 });
    let child: Deno.ChildProcess;
    try {
      child = new Deno.Command(path, { args: ["-c", file], stdin: "null", stdout: "null", stderr: "piped" }).spawn();
    } catch (cause) {
      await Deno.remove(folder, { recursive: true });
      if (cause instanceof Deno.errors.NotCapable) throw cause;
      throw new NatsServerError(`${path} cannot be started`, { cause });
    }
    const { promise, resolve, reject } = Promise.withResolvers<number>();
    const said: string[] = [];
    const read = async () => {
      let listening: number | undefined;
      let rest = "";
      for await (const text of child.stderr.pipeThrough(new TextDecoderStream())) {
        const lines = (rest + text).split("\n");
        rest = lines.pop()!;
        for (const line of lines) {
          const found = /Listening for client connections on .*:(\d+)/.exec(line);
          if (found !== null) listening = Number(found[1]);
          if (/Server is ready/.test(line) && listening !== undefined) resolve(listening);
          said.push(line);
          if (said.length > 20) said.shift();
        }
      }
      const why = [...said, rest].filter((line) => /\[(ERR|FTL)\]|^nats-server:/.test(line)).join("\n");
      reject(new NatsServerError(`${path} ended at once${why === "" ? "" : `: ${why}`}`));
    };
    const log = read().catch(reject);
    const timer = setTimeout(
      () => reject(new NatsServerError(`${path} is not ready after ${timeoutMs} ms`)),
      timeoutMs,
    );
    try {
      const listening = await promise;
      return new NatsServer({ child, folder, log, host, port: listening }, token);
    } catch (error) {
      kill(child, "SIGKILL");
      await log;
      await child.status;
      await Deno.remove(folder, { recursive: true });
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  /** Ends it, and removes its configuration. */
  stop(): Promise<void> {
    this.#stopping ??= (async () => {
      kill(this.#child, "SIGTERM");
      const timer = setTimeout(() => kill(this.#child, "SIGKILL"), STOP_MS);
      await this.#child.status;
      clearTimeout(timer);
      await this.#log;
      if (this.#guard !== undefined) {
        kill(this.#guard, "SIGKILL"); // before its input ends: the number may be another's soon
        await this.#guard.stdin.close().catch(() => {});
        await this.#guard.status;
      }
      await Deno.remove(this.#folder, { recursive: true });
    })();
    return this.#stopping;
  }

  /** Sends a signal, for tests that kill or suspend it. */
  kill(signal: Deno.Signal): void {
    kill(this.#child, signal);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }
}

function startGuard(pid: number): Deno.ChildProcess | undefined {
  if (Deno.build.os === "windows") return undefined;
  const args = ["-c", GUARD, "sh", `${pid}`];
  try {
    return new Deno.Command("sh", { args, stdin: "piped", stdout: "null", stderr: "null" }).spawn();
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotCapable) return undefined;
    throw error;
  }
}

function kill(child: Deno.ChildProcess, signal: Deno.Signal): void {
  try {
    child.kill(signal);
  } catch { /* it has ended */ }
}

/** The address under which a server that listens on `host` is reached from its own machine. */
function reachable(host: string): string {
  if (host === "0.0.0.0" || host === "::") return "127.0.0.1";
  return host.includes(":") ? `[${host}]` : host;
}

function configuration(parts: { host: string; port: number; token: string | undefined; extra: string }): string {
  const { host, port, token, extra } = parts;
  return [
    `host: ${JSON.stringify(host)}`,
    `port: ${port === 0 ? -1 : port}`,
    "max_payload: 1048576",
    "max_pending: 67108864",
    `ping_interval: "2s"`,
    "ping_max: 2",
    `write_deadline: "5s"`,
    ...(token === undefined ? [] : [`authorization { token: ${JSON.stringify(token)} }`]),
    extra,
    "",
  ].join("\n");
}
