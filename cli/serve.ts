import type { Command } from "commander";
import { createApp, createLoadingApp } from "../orchestrator/api/mod.ts";
import { LoadingLine } from "./loading.ts";
import type { WorkerLoading } from "../orchestrator/mod.ts";
import { startLocalCluster } from "./local_cluster.ts";
import type { LocalCluster } from "./local_cluster.ts";
import type { NatsCluster } from "./nats_cluster.ts";
import { openNatsCluster } from "./nats_cluster.ts";
import { natsAddress, withNatsOptions } from "./nats_options.ts";
import type { NatsFlags } from "./nats_options.ts";
import { clusterOptions, integer, number, withClusterOptions } from "./options.ts";
import type { ClusterFlags } from "./options.ts";
import { FALLBACK_TURNS } from "./run.ts";

interface ServeFlags extends ClusterFlags, NatsFlags {
  workers: number;
  streams?: number;
  recovery: number;
  standby?: boolean;
  /** False: `--no-worker`. */
  worker?: boolean;
  natsHost?: string;
  natsPort: number;
  host: string;
  port: number;
  apiKey?: string;
  cors?: boolean;
  kvTokens?: number;
}

/** Adds the command `serve`. */
export function addServe(program: Command): void {
  const command = program.command("serve")
    .description("answer over HTTP as OpenAI's API does, with a web page")
    .argument("<model>", "a GGUF file, a folder with safetensors, or hf:org/repo[:file] that was pulled")
    .option("--host <address>", "address to listen on; 0.0.0.0 is all", "127.0.0.1")
    .option("--port <n>", "port to listen on", integer(0), 11535)
    .option("--api-key <key>", "ask clients for this key (or set LUTRA_API_KEY)")
    .option("--cors", "let web pages of other origins ask")
    .option("--kv-tokens <n>", "tokens that the KV cache holds over all requests", integer(2));
  withNatsOptions(
    withClusterOptions(command),
    "serve with the workers on this NATS server; `embedded` starts one",
  )
    .option(
      "--nats-host <address>",
      "address that an embedded NATS server listens on (default: all with a token, else 127.0.0.1)",
    )
    .option("--nats-port <n>", "port that an embedded NATS server listens on", integer(0), 4222)
    .option("--workers <n>", "workers to wait for before the model is placed", integer(1), 1)
    .option(
      "--streams <n>",
      "requests that run at once, for which the model is placed: with 1 devices compute a prompt together (default: many)",
      integer(1),
    )
    .option("--recovery <seconds>", "how long requests wait for a lost worker to be replaced", number(0, 3600), 10)
    .option("--standby", "have devices fetch the layers, too, that they would take over from one that is lost")
    .option("--no-worker", "do not compute on this device, with --nats");
  command.action(async (path: string, flags: ServeFlags) => {
    const apiKey = flags.apiKey ?? Deno.env.get("LUTRA_API_KEY");
    // The port is open at once, so that clients and probes learn how far loading is.
    let loaded = 0;
    let answer = createLoadingApp(() => loaded).fetch;
    const listening = Promise.withResolvers<Deno.NetAddr>();
    const server = Deno.serve(
      { hostname: flags.host, port: flags.port, onListen: listening.resolve },
      (request) => answer(request),
    );
    using line = new LoadingLine();
    await using cluster = await load(path, flags, line, (fraction) => loaded = fraction).catch(async (error) => {
      await server.shutdown();
      throw error;
    });
    const { engine } = cluster;
    if (engine.model.chatTemplate.isFallback) {
      console.error(`warning: the model has no chat template; ${FALLBACK_TURNS}`);
    }
    answer = createApp({
      engine,
      page: Deno.readTextFileSync(new URL("../orchestrator/page/page.html", import.meta.url)),
      ...(apiKey === undefined || apiKey === "" ? {} : { apiKey }),
      ...(flags.cors === true ? { cors: true } : {}),
    }).fetch;
    const { hostname, port } = await listening.promise;
    const shown = hostname === "0.0.0.0" ? "127.0.0.1" : hostname.includes(":") ? `[${hostname}]` : hostname;
    const where = "threads" in cluster
      ? `${engine.stats().stages.length} × ${cluster.threads} threads`
      : `cluster ${flags.cluster}`;
    console.log(`${engine.model.id} on http://${shown}:${port} (API under /v1, ${where})`);
    let stopping = false;
    const end = () => {
      // The first signal: no new requests, running ones are answered. The second: at once.
      if (stopping) Deno.exit(130);
      stopping = true;
      console.error("stopping when running requests are answered; again to stop now");
      void server.shutdown();
    };
    const signals: Deno.Signal[] = Deno.build.os === "windows" ? ["SIGINT"] : ["SIGINT", "SIGTERM"];
    for (const signal of signals) Deno.addSignalListener(signal, end);
    await server.finished;
    for (const signal of signals) Deno.removeSignalListener(signal, end);
  });
}

async function load(
  path: string,
  flags: ServeFlags,
  line: LoadingLine,
  onLoading: (fraction: number) => void,
): Promise<LocalCluster | NatsCluster> {
  const options = {
    ...clusterOptions(flags),
    ...(flags.kvTokens === undefined ? {} : { kvTokens: flags.kvTokens }),
    onLoading: (fraction: number, workers: readonly WorkerLoading[]) => {
      onLoading(fraction);
      line.show(fraction, workers);
    },
    onHashing: (fraction: number) => {
      onLoading(fraction);
      line.tell(`hashing ${Math.floor(100 * fraction)} %`);
    },
  };
  const address = natsAddress(flags);
  if (address === undefined) {
    const { onHashing: _, ...local } = options;
    return await startLocalCluster(path, local).finally(() => line[Symbol.dispose]());
  }
  const { natsHost, natsPort, workers, streams, worker = true } = flags;
  return await openNatsCluster(path, {
    ...options,
    recoveryTimeoutMs: 1000 * flags.recovery,
    standby: flags.standby === true,
    ...{ flags, address, natsPort, workers, worker },
    ...(streams === undefined ? {} : { streams }),
    ...(natsHost === undefined ? {} : { natsHost }),
  });
}
