import { createHash } from "node:crypto";
import {
  BusError,
  clusterSubjects,
  controlReplySchema,
  decodeJson,
  encodeJson,
  shardTensors,
  WireError,
} from "../bus/mod.ts";
import type { Bus, Hello, Shard } from "../bus/mod.ts";
import type { ModelDescription } from "../model/mod.ts";
import { HOP_SECONDS } from "./placement.ts";
import type { Device } from "./placement.ts";
import { shardOf } from "./served_model.ts";
import type { ShardSettings } from "./served_model.ts";

/** Milliseconds that a worker may take to measure its speed. */
const MEASURE_MS = 15_000;
/** Tokens of the cache of a probe; it sees one at a time. */
const PROBE_TOKENS = 32;
/** Where a tensor of a probe may begin. */
const PROBE_ALIGNMENT = 256;

/** What devices measure their speed with: a model's last layer and its head, as a request to workers. */
export interface Probe {
  readonly type: "measure";
  /** Of the shard: models whose last layers and heads are alike have the same. */
  readonly probe: string;
  /** Its tensors lie in a file of their own, one after the other, each once; the weights are of no account. */
  readonly shard: Shard;
}

/** The probe of a model. */
export function probeOf(
  description: ModelDescription,
  { kv, activations = "a8", context }: Pick<ShardSettings, "kv" | "activations" | "context">,
): Probe {
  const { layers } = description.hyper;
  const shard = structuredClone(shardOf(description, { first: layers - 1, end: layers }, {
    ...{ path: "probe", kv: { ...kv, tokens: PROBE_TOKENS }, activations, maxBatch: 1, context },
  }));
  const places = new Map<string, number>();
  let end = 0;
  for (const tensor of shardTensors(shard)) {
    const place = `${tensor.name} ${tensor.file ?? 0} ${tensor.offset}`;
    let offset = places.get(place);
    if (offset === undefined) {
      places.set(place, offset = end);
      end = Math.ceil((offset + tensor.bytes) / PROBE_ALIGNMENT) * PROBE_ALIGNMENT;
    }
    tensor.offset = offset;
    delete tensor.file;
  }
  const probe = createHash("sha256").update(JSON.stringify(shard)).digest("hex");
  return { type: "measure", probe, shard };
}

/**
 * A worker as placement sees it: what another probe measured is of no account.
 *
 * @param hopMs Milliseconds to it and back, if known; less than {@linkcode HOP_SECONDS} is not told from that.
 */
export function deviceOf(
  { id, capabilities: { memoryBytes, bandwidthGBps, speed } }: Pick<Hello, "id" | "capabilities">,
  { probe }: Probe,
  hopMs: number | null,
): Device {
  return {
    ...{ id, memoryBytes, bandwidthGBps },
    ...(speed?.probe !== probe
      ? {}
      : { speed: { layerSeconds: speed.msPerLayer / 1000, headSeconds: speed.msHead / 1000 } }),
    ...(hopMs === null ? {} : { hopSeconds: Math.max(HOP_SECONDS, hopMs / 1000) }),
  };
}

/**
 * Has a worker measure its speed, which it then announces.
 *
 * @returns Why it did not, if so.
 */
export async function askToMeasure(
  bus: Bus,
  cluster: string,
  worker: string,
  probe: Probe,
  signal?: AbortSignal,
): Promise<string | undefined> {
  try {
    const options = { timeoutMs: MEASURE_MS, ...(signal === undefined ? {} : { signal }) };
    const { data } = await bus.request(clusterSubjects(cluster).control(worker), encodeJson(probe), options);
    const reply = decodeJson(controlReplySchema, data);
    return reply.ok ? undefined : reply.error;
  } catch (error) {
    if (!(error instanceof BusError || error instanceof WireError)) throw error;
    return error.message;
  }
}
