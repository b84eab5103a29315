import { existsSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { InvalidArgumentError } from "commander";
import type { Command } from "commander";
import { NatsBus } from "../bus/mod.ts";
import type { Bus } from "../bus/mod.ts";
import { deviceHealth, loadKernels, Worker } from "../worker/mod.ts";
import type { WorkerOptions } from "../worker/mod.ts";
import { cacheFolder, cacheFolderIfAny } from "./hub/reference.ts";
import { deviceId, HEARTBEAT_MS, natsAddress, natsOptions, withNatsOptions } from "./nats_options.ts";
import type { NatsFlags } from "./nats_options.ts";
import { cacheChoice, integer, number } from "./options.ts";

interface WorkerFlags extends NatsFlags {
  id?: string;
  threads?: number;
  isa?: string;
  memory?: number;
  bandwidth?: number;
  measure?: boolean;
  lane?: boolean;
  models?: string;
  drain: number;
  cache?: boolean;
}

/** Adds the command `worker`. */
export function addWorker(program: Command): void {
  const command = program.command("worker")
    .description("lend this device to a cluster, until it is told to stop")
    .option("--id <name>", "name of this device, the same after every start (default: from the host's name)")
    .option("--threads <n>", "threads (default: all cores)", integer(1))
    .option("--isa <name>", "instruction set of the kernels (default: the best)")
    .option("--memory <gb>", "memory to lend (default: what is free now)", number(0.001, 1e6))
    .option("--bandwidth <gbps>", "memory bandwidth, instead of measuring it", number(0.001, 1e6))
    .option("--no-measure", "do not run kernels on layers to see how fast they are here: place layers by bandwidth")
    .option(
      "--no-lane",
      "no connection of the kernels' own: every message goes through JavaScript, which makes hops longer",
    )
    .option(
      "--models <folder>",
      "where this device has model files (default: under the orchestrator's paths; layers that it has not are fetched)",
    )
    .option(
      "--drain <seconds>",
      "how long to wait, when told to stop, until others have the layers",
      number(0, 3600),
      20,
    )
    .option("--no-cache", "do not keep packed weights on disk for the next start; those fetched are kept");
  withNatsOptions(command, "address of the cluster's NATS server").action(async (flags: WorkerFlags) => {
    const address = natsAddress(flags);
    if (address === undefined) throw new InvalidArgumentError("--nats says where the cluster's NATS server is.");
    // Servers and boards start in any order.
    const bus = await NatsBus.connect({ ...natsOptions(flags, address), name: flags.id ?? deviceId(), wait: true });
    try {
      const refused = Promise.withResolvers<never>();
      const worker = await startWorker(bus, flags, refused.reject);
      console.log(`worker ${worker.id} is ready (cluster ${flags.cluster})`);
      const stopped = untilToldToStop();
      const member = bus.store(flags.cluster)?.join(worker.id);
      try {
        await Promise.race([stopped.promise, refused.promise]);
        console.error("leaving when others have the layers; again to stop now");
        await worker.drain(1000 * flags.drain);
      } finally {
        stopped.dispose();
        await member?.[Symbol.asyncDispose]();
        await worker.close();
      }
    } finally {
      await bus.close();
    }
  });
}

/** A worker of this device, as its flags say. */
export async function startWorker(
  bus: Bus,
  flags:
    & Pick<
      WorkerFlags,
      "id" | "threads" | "isa" | "memory" | "bandwidth" | "measure" | "lane" | "models" | "cluster" | "cache"
    >
    & {
      /** Whether other devices may fetch weights from this one. Default: they may. */
      share?: boolean;
    },
  onRefused: (error: Error) => void,
): Promise<Worker> {
  const { models, memory } = flags;
  const free = Deno.systemMemoryInfo().available;
  const kernels = loadKernels();
  return await Worker.start({
    bus,
    kernels,
    id: flags.id ?? deviceId(),
    cluster: flags.cluster,
    ...(flags.threads === undefined ? {} : { threads: flags.threads }),
    ...(flags.isa === undefined ? {} : { isa: flags.isa }),
    cache: flags.cache === false ? null : cacheChoice(),
    ...weightsChoice(flags.share ?? true),
    memoryBytes: Math.floor(memory === undefined ? free : Math.min(1e9 * memory, free)),
    bandwidthGBps: flags.bandwidth ?? "measure",
    measure: flags.measure !== false,
    lane: flags.lane !== false,
    heartbeatMs: HEARTBEAT_MS,
    diagnose: (model) =>
      deviceHealth({
        cores: flags.threads ?? kernels.deviceInfo().cores,
        ...(flags.cache === false ? {} : { cacheFolder: cacheFolder() }),
        ...(model === undefined ? {} : { model }),
      }),
    ...(models === undefined ? {} : {
      // A model that is a folder there may be one here, too.
      resolvePath: (path) =>
        [join(models, basename(dirname(path)), basename(path)), join(models, basename(path))].find((own) =>
          existsSync(own)
        ) ?? path,
    }),
    onRefused: (reason) => onRefused(new Error(`the cluster refuses this worker: ${reason}`)),
    log: (message) => console.error(message),
  });
}

/** Where fetched weights are kept; without a cache folder this device must have the model's file. */
function weightsChoice(share: boolean): Pick<WorkerOptions, "weights"> {
  const cache = cacheFolderIfAny();
  return cache === undefined ? {} : { weights: { cache, maxBytes: cacheChoice().maxBytes, share } };
}

/** Resolves at the first signal; the second ends the process. */
export function untilToldToStop(): { promise: Promise<void>; dispose(): void } {
  const { promise, resolve } = Promise.withResolvers<void>();
  let stopping = false;
  const end = () => {
    if (stopping) Deno.exit(130);
    stopping = true;
    resolve();
  };
  const signals: Deno.Signal[] = Deno.build.os === "windows" ? ["SIGINT"] : ["SIGINT", "SIGTERM"];
  for (const signal of signals) Deno.addSignalListener(signal, end);
  return {
    promise,
    dispose: () => {
      for (const signal of signals) Deno.removeSignalListener(signal, end);
    },
  };
}
