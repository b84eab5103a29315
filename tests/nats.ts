/**
 * A nats-server for tests. It is looked for on PATH and in `tests/.bin`, where `tests/install_nats_server.ts` leaves one. Tests
 * that need it report themselves as ignored where there is none; in CI they fail then.
 *
 * @module
 */
import { findNatsServer, NatsServer, NatsServerError, storesKeys } from "../bus/mod.ts";
import type { NatsServerOptions } from "../bus/mod.ts";
import { repoPath } from "./data.ts";

const path = findNatsServer([repoPath("tests/.bin")]);

/** What tests need to know of the server. */
export const nats = {
  /** For `ignore` of a test. In CI tests are never ignored. */
  absent: path === undefined && Deno.env.get("CI") !== "true",
  /** Whether the server is one whose JetStream Lutra uses; what needs it reports itself as ignored otherwise. */
  get stores(): boolean {
    if (path === undefined) return false;
    const { stdout } = new Deno.Command(path, { args: ["--version"] }).outputSync();
    return storesKeys(/\d+\.\d+\.\d+/.exec(new TextDecoder().decode(stdout))?.[0] ?? "0");
  },
  /** Starts a server on a free port. */
  start(options: NatsServerOptions = {}): Promise<NatsServer> {
    if (path === undefined) {
      throw new NatsServerError("there is no nats-server: run `deno task install-nats`, or install it with apt");
    }
    return NatsServer.start({ path, ...options });
  },
  path,
} as const;
