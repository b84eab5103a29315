import { dirname, join } from "node:path";
import { NatsBus, NatsServer } from "../bus/mod.ts";
import type { WeightsRef } from "../bus/mod.ts";
import { loadModel } from "../model/mod.ts";
import type { LoadedModel } from "../model/mod.ts";
import { Engine } from "../orchestrator/mod.ts";
import type { Worker } from "../worker/mod.ts";
import { ChunkFiles, manifestOf, WeightSource } from "../weights/mod.ts";
import { cacheFolderIfAny, modelPath } from "./hub/reference.ts";
import { EMBEDDED, LOST_MS, natsOptions } from "./nats_options.ts";
import type { NatsFlags } from "./nats_options.ts";
import type { LocalClusterOptions } from "./local_cluster.ts";
import { startWorker } from "./worker.ts";

/** Options of {@linkcode openNatsCluster}. */
export interface NatsClusterOptions extends LocalClusterOptions {
  flags: NatsFlags;
  /** The server's address, or `embedded`. */
  address: string;
  /** Address of an embedded server. Default: all with a token, else this machine's own: nobody else is let in unasked. */
  natsHost?: string;
  /** Its port. */
  natsPort: number;
  /** Workers to wait for. */
  workers: number;
  /** Compute on this device too. */
  worker: boolean;
  /** Told how much of the model's file is hashed, for workers that lack it. */
  onHashing?: (fraction: number) => void;
}

/** The orchestrator's side of a cluster. */
export interface NatsCluster extends AsyncDisposable {
  readonly engine: Engine;
  close(): Promise<void>;
}

/**
 * Connects to a NATS server, or starts one, and opens an engine over the workers that are or come there. It does not wait for
 * them: see {@linkcode Engine.ready}.
 */
export async function openNatsCluster(path: string, options: NatsClusterOptions): Promise<NatsCluster> {
  const { flags, address, natsHost, natsPort, workers, worker: own, threads, isa, cache, onHashing, ...rest } = options;
  const model = await loadModel(modelPath(path));
  for (const warning of model.warnings) console.error(`warning: ${warning}`);
  const ends: (() => Promise<unknown>)[] = [];
  let engine: Engine | undefined;
  const close = async () => {
    for (const end of ends.splice(0).reverse()) await end();
  };
  try {
    let servers = address;
    if (address === EMBEDDED) {
      const token = flags.natsToken ?? Deno.env.get("LUTRA_NATS_TOKEN") ?? "";
      const host = natsHost ?? (token === "" ? "127.0.0.1" : "0.0.0.0");
      if (host === "127.0.0.1") console.error("other devices are let in with --nats-token, or by --nats-host");
      const server = await NatsServer.start({
        host,
        port: natsPort,
        ...(token === "" ? {} : { token }),
      });
      ends.push(() => server.stop());
      servers = server.url;
      console.error(`NATS server on ${host}:${server.port}`);
    }
    const bus = await NatsBus.connect({ ...natsOptions(flags, servers), name: "lutra-orchestrator", wait: true });
    ends.push(() => bus.close());
    const offer = await offerWeights(bus, flags.cluster, model, () => engine?.busy === true, onHashing);
    if (offer !== undefined) ends.push(() => offer.source.close());
    const store = bus.store(flags.cluster);
    let worker: Worker | undefined;
    if (own) {
      worker = await startWorker(bus, {
        cluster: flags.cluster,
        ...(threads === undefined ? {} : { threads }),
        ...(isa === undefined ? {} : { isa }),
        cache: cache !== null,
        share: false, // it is done here
      }, (error) => console.error(error.message));
      ends.push(() => worker!.close());
      const member = store?.join(worker.id);
      ends.push(async () => await member?.[Symbol.asyncDispose]());
    }
    engine = await Engine.open({
      bus,
      model,
      cluster: flags.cluster,
      workers,
      workerTimeoutMs: Infinity,
      patient: true,
      lostMs: LOST_MS,
      unload: false, // who serves next may want them
      log: (message) => console.error(message),
      ...(offer === undefined ? {} : { weights: offer.ref }),
      store,
      ...rest,
    });
    ends.push(() => engine!.close());
    return { engine, close, [Symbol.asyncDispose]: close };
  } catch (error) {
    await close();
    throw error;
  }
}

/** Gives workers that lack the model's files what they need of it; `undefined` where that cannot be. */
async function offerWeights(
  bus: NatsBus,
  cluster: string,
  model: LoadedModel,
  busy: () => boolean,
  onProgress: (fraction: number) => void = () => {},
): Promise<{ source: WeightSource; ref: WeightsRef } | undefined> {
  const log = (message: string) => console.error(message);
  const paths = [model.path, ...model.files.map((name) => join(dirname(model.path), name))];
  const cache = cacheFolderIfAny();
  if (cache === undefined) return undefined;
  const manifest = await manifestOf(paths, cache, { onProgress, log });
  const file = await ChunkFiles.open(paths, manifest, cache, "own");
  file.trust();
  const id = `orchestrator-${crypto.randomUUID().slice(0, 8)}`;
  return {
    source: new WeightSource({ bus, cluster, id, file, busy, log }),
    ref: { root: manifest.root, files: [...manifest.files] },
  };
}
