import { createHash } from "node:crypto";
import { InvalidArgumentError } from "commander";
import type { Command } from "commander";
import type { NatsOptions } from "../bus/mod.ts";

/** How a cluster is reached, as the command line says it. */
export interface NatsFlags {
  nats?: string;
  natsToken?: string;
  natsUser?: string;
  natsPassword?: string;
  natsNkey?: string;
  natsCreds?: string;
  natsCa?: string;
  natsCert?: string;
  natsKey?: string;
  cluster: string;
}

/** What `--nats` may be instead of an address. */
export const EMBEDDED = "embedded";

/** Milliseconds between heartbeats, and of silence after which a worker is lost. */
export const HEARTBEAT_MS = 400;
export const LOST_MS = 1600;

/** Adds the options of {@linkcode NatsFlags}. Secrets are better named by the environment than on a command line. */
export function withNatsOptions(command: Command, what: string): Command {
  return command
    .option("--nats <url>", `${what} (or set LUTRA_NATS)`)
    .option("--nats-token <token>", "token for the NATS server (or set LUTRA_NATS_TOKEN)")
    .option("--nats-user <name>", "user for the NATS server")
    .option("--nats-password <text>", "password of that user (or set LUTRA_NATS_PASSWORD)")
    .option("--nats-nkey <file>", "file with the seed of an nkey")
    .option("--nats-creds <file>", "credentials file")
    .option("--nats-ca <file>", "certificate of the authority that signed the server's, PEM")
    .option("--nats-cert <file>", "this client's certificate for mutual TLS, PEM")
    .option("--nats-key <file>", "key of that certificate, PEM")
    .option("--cluster <name>", "name of the cluster, where several share a server", "lutra");
}

/** The address that is named, on the command line or in the environment. */
export function natsAddress(flags: NatsFlags): string | undefined {
  const address = flags.nats ?? Deno.env.get("LUTRA_NATS");
  return address === "" ? undefined : address;
}

/** The connection's options that the flags stand for. Reads the files they name. */
export function natsOptions(flags: NatsFlags, servers: string): NatsOptions {
  const read = (file: string | undefined) => file === undefined ? undefined : Deno.readTextFileSync(file);
  const given = <K extends string>(key: K, value: string | undefined) =>
    (value === undefined || value === "" ? {} : { [key]: value }) as { [key in K]?: string };
  if ((flags.natsCert === undefined) !== (flags.natsKey === undefined)) {
    throw new InvalidArgumentError("--nats-cert and --nats-key belong together.");
  }
  const tls = {
    ...given("ca", read(flags.natsCa)),
    ...given("cert", read(flags.natsCert)),
    ...given("key", read(flags.natsKey)),
  };
  return {
    servers: servers.split(","),
    ...given("token", flags.natsToken ?? Deno.env.get("LUTRA_NATS_TOKEN")),
    ...given("user", flags.natsUser),
    ...given("password", flags.natsPassword ?? Deno.env.get("LUTRA_NATS_PASSWORD")),
    ...given("nkeySeed", read(flags.natsNkey)),
    ...given("creds", read(flags.natsCreds)),
    ...(Object.keys(tls).length === 0 ? {} : { tls }),
    onError: (error, subject) => console.error(`bus (${subject}): ${error instanceof Error ? error.message : error}`),
  };
}

/**
 * A name for this device that is the same after every start: its host's name with a few letters of its machine's number, which
 * copies of one system may share: then `--id` tells them apart.
 */
export function deviceId(): string {
  const host = Deno.hostname().split(".")[0]!.replace(/[^A-Za-z0-9_-]/g, "-").slice(0, 40);
  let machine = "";
  try {
    machine = Deno.readTextFileSync("/etc/machine-id").trim();
  } catch { /* other systems have none: the name alone must do */ }
  const suffix = machine === "" ? "" : `-${createHash("sha256").update(`lutra ${machine}`).digest("hex").slice(0, 6)}`;
  return `${host === "" ? "device" : host}${suffix}`;
}
