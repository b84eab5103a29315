import { InProcessBus } from "../bus/mod.ts";
import { modelPath } from "./hub/reference.ts";
import { loadModel } from "../model/mod.ts";
import { Engine } from "../orchestrator/mod.ts";
import type { EngineOptions } from "../orchestrator/mod.ts";
import { loadKernels, Worker } from "../worker/mod.ts";
import type { WorkerOptions } from "../worker/mod.ts";

/** Options of {@linkcode startLocalCluster}. */
export interface LocalClusterOptions extends Omit<EngineOptions, "bus" | "model" | "workers" | "cluster"> {
  /** Threads of each worker. Default: the cores divided by the shards. */
  threads?: number;
  /** Instruction set. Default: the best. */
  isa?: string;
  /** Whether threads are bound to cores. @default {"none"} */
  pin?: "none" | "cores";
  /** Cache of packed weights on disk. Default: none. */
  cache?: WorkerOptions["cache"];
  /** Whether kernels are measured on this device. @default {"auto"} */
  tune?: WorkerOptions["tune"];
}

/** A cluster within this process. */
export interface LocalCluster extends AsyncDisposable {
  readonly engine: Engine;
  /** Threads of each worker. */
  readonly threads: number;
  close(): Promise<void>;
}

/**
 * Starts an in-process bus, a worker for every shard, and an engine that serves `path` with them: the path of a real
 * cluster, on one machine.
 */
export async function startLocalCluster(path: string, options: LocalClusterOptions = {}): Promise<LocalCluster> {
  const { threads: wanted, isa, pin = "none", cache = null, tune = "auto", shards = 1, ...rest } = options;
  const model = await loadModel(modelPath(path)); // before anything is started: a wrong path is the likeliest error
  for (const warning of model.warnings) console.error(`warning: ${warning}`);
  const kernels = loadKernels();
  const threads = wanted ?? Math.max(1, Math.floor(kernels.deviceInfo().cores / shards));
  const bus = new InProcessBus();
  const workers: Worker[] = [];
  let engine: Engine | undefined;
  const close = async () => {
    await engine?.close();
    await Promise.all(workers.map((worker) => worker.close()));
    await bus.close();
  };
  try {
    for (let i = 0; i < shards; i++) {
      workers.push(
        await Worker.start({
          bus,
          kernels,
          id: `local-${i}`,
          threads,
          pin,
          cache,
          tune,
          ...(isa === undefined ? {} : { isa }),
          log: (message) => console.error(message),
        }),
      );
    }
    engine = await Engine.start({ bus, model, shards, workers: shards, ...rest });
    return { engine, threads, close, [Symbol.asyncDispose]: close };
  } catch (error) {
    await close();
    throw error;
  }
}
