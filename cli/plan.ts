import { existsSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { InvalidArgumentError } from "commander";
import type { Command } from "commander";
import { NatsBus } from "../bus/mod.ts";
import { isModelFolder, loadModel, MODEL_SHAPES, ModelError, shapeOfConfig, sketchModel } from "../model/mod.ts";
import type { ModelDescription } from "../model/mod.ts";
import {
  askToMeasure,
  DEFAULT_CONTEXT,
  deviceOf,
  HOP_SECONDS,
  Membership,
  modelCost,
  placeReplicas,
  predictReplicas,
  probeOf,
  stageCosts,
  Telemetry,
} from "../orchestrator/mod.ts";
import type { Device, ModelCost, Probe, Replica } from "../orchestrator/mod.ts";
import { isHubReference, modelPath } from "./hub/reference.ts";
import { bytes, table } from "./inspect.ts";
import { natsAddress, natsOptions, withNatsOptions } from "./nats_options.ts";
import type { NatsFlags } from "./nats_options.ts";
import { integer, number } from "./options.ts";

interface PlanFlags extends NatsFlags {
  device?: Device[];
  type: string;
  shards?: number;
  streams?: number;
  context?: number;
  kvType: "f16" | "f32" | "q8";
  kvTokens?: number;
  hop?: number;
  measure: boolean;
  wait: number;
  json?: boolean;
}

/** Adds the command `plan`. */
export function addPlan(program: Command): void {
  const command = program.command("plan")
    .description(
      "show how a model would lie on devices, described ones or those of a cluster, and how fast that would be",
    )
    .argument(
      "<model>",
      `a GGUF file, hf:org/repo[:file] that was pulled, or without weights: a config.json, or one of ${
        [...MODEL_SHAPES.keys()].join(", ")
      }`,
    )
    .option(
      "--device <memory:bandwidth>",
      "a device, as 8GB:12GBps, or 4x8GB:12GBps for four; once for each",
      (text: string, before: Device[] = []) => [...before, ...parseDevices(text, before.length)],
    )
    .option("--type <name>", "type of the weights, as GGML names it, where there is no file", "Q4_0")
    .option("--shards <n>", "split the layers into n stages, in one replica", integer(1))
    .option("--streams <n>", "requests that run at once, for which it is placed (default: many)", integer(1))
    .option("--context <tokens>", "most tokens of prompt and answer (default: the model's, at most 8192)", integer(2))
    .option("--kv-type <type>", "element type of the KV cache: f16, f32 or q8", parseKvType, "f16")
    .option("--kv-tokens <n>", "tokens that the KV cache holds over all requests", integer(2))
    .option(
      "--hop <ms>",
      "milliseconds from one device to the next (default: of a cluster's, as measured; else 0.4)",
      number(0, 1e4),
    )
    .option("--no-measure", "do not have a cluster's devices run kernels on a layer: go by what is known of them")
    .option("--wait <seconds>", "how long to wait for a cluster's devices to answer", number(0.1, 60), 1)
    .option("--json", "print JSON");
  withNatsOptions(command, "plan for the devices that answer on this NATS server").action(
    async (model: string, flags: PlanFlags) => {
      const description = await describe(model, flags.type);
      const context = flags.context ?? Math.min(description.hyper.context, DEFAULT_CONTEXT);
      const kv = { type: flags.kvType, tokens: flags.kvTokens ?? Math.max(context, DEFAULT_CONTEXT) };
      const cost = modelCost(description, kv);
      const devices = flags.device ?? await clusterDevices(flags, probeOf(description, { kv, context }));
      const hopSeconds = flags.hop === undefined ? HOP_SECONDS : flags.hop / 1000;
      const options = {
        hopSeconds,
        ...(flags.shards === undefined ? {} : { shards: flags.shards }),
        ...(flags.streams === undefined ? {} : { streams: flags.streams }),
      };
      show(cost, devices, placeReplicas(cost, devices, options), options, flags.json === true);
    },
  );
}

/** What is known of a model, with or without its weights. */
async function describe(model: string, type: string): Promise<ModelDescription> {
  if (isHubReference(model)) return (await loadModel(modelPath(model))).description;
  const config = basename(model) === "config.json" ? model : join(model, "config.json");
  const weights = join(model, "model.safetensors");
  if (existsSync(config) && !(isModelFolder(model) && (existsSync(weights) || existsSync(`${weights}.index.json`)))) {
    return sketchModel(basename(resolve(config, "..")), shapeOfConfig(config), type);
  }
  if (existsSync(model)) return (await loadModel(model)).description;
  const shape = MODEL_SHAPES.get(model.toLowerCase());
  if (shape !== undefined) return sketchModel(model, shape, type);
  throw new ModelError(
    `there is neither a file ${model} nor a known model of that name; known are ${[...MODEL_SHAPES.keys()].join(", ")}`,
  );
}

/** Milliseconds between pings of a cluster's devices. */
const PING_MS = 100;

/** The devices that lend themselves to a cluster; those that are not at work measure how fast the model would be there. */
async function clusterDevices(flags: PlanFlags, probe: Probe): Promise<Device[]> {
  const address = natsAddress(flags);
  if (address === undefined) throw new InvalidArgumentError("give --device, or --nats for those of a cluster.");
  const bus = await NatsBus.connect({ ...natsOptions(flags, address), name: "lutra-plan" });
  const telemetry = new Telemetry(bus, flags.cluster, flags.hop === undefined ? PING_MS : 0);
  const membership = new Membership(bus, flags.cluster, { onHello: (hello) => telemetry.take(hello, undefined) });
  try {
    membership.discover();
    await new Promise((done) => setTimeout(done, 1000 * flags.wait));
    const idle = membership.workers.filter(({ capabilities, work }) =>
      capabilities.speed?.probe !== probe.probe && work.stages.length === 0
    );
    await Promise.all((flags.measure ? idle : []).map(async ({ id }) => {
      const trouble = await askToMeasure(bus, flags.cluster, id, probe);
      if (trouble !== undefined) console.error(`${id} counts by its memory bandwidth: ${trouble}`);
    }));
    return membership.workers.map((hello) => deviceOf(hello, probe, telemetry.shortest(hello.id)))
      .sort((a, b) => a.id < b.id ? -1 : 1);
  } finally {
    telemetry.close();
    membership.close();
    await bus.close();
  }
}

function show(
  cost: ModelCost,
  devices: readonly Device[],
  replicas: readonly Replica[],
  options: { hopSeconds: number; streams?: number },
  json: boolean,
): void {
  const rows = replicas.flatMap((stages, replica) => {
    const costs = stageCosts(cost, devices, stages);
    return stages.map((stage, i) => ({ replica, ...stage, ...costs[i]! }));
  });
  const { oneStream, manyStreams } = predictReplicas(cost, devices, replicas, options);
  const idle = devices.filter(({ id }) => rows.every(({ worker }) => worker !== id)).map(({ id }) => id);
  if (json) {
    const measured = devices.map(({ id, speed, hopSeconds: own }) => ({
      id,
      msPerLayer: speed == null ? null : 1000 * speed.layerSeconds,
      msHead: speed == null ? null : 1000 * speed.headSeconds,
      hopMs: 1000 * (own ?? options.hopSeconds),
    }));
    const rates = { oneStreamTokS: oneStream, manyStreamsTokS: manyStreams };
    return console.log(JSON.stringify({ stages: rows, idle, devices: measured, ...rates }));
  }
  const several = replicas.length > 1;
  const byId = new Map(devices.map((device) => [device.id, device]));
  const ms = (seconds: number | undefined) => seconds === undefined ? "–" : (1000 * seconds).toFixed(3);
  console.log([
    ...table(
      [...(several ? ["replica"] : []), "device", "layers", "memory", "of", "ms/layer", "head", "hop", "ms a token"],
      rows.map(({ replica, worker, first, end, memoryBytes, seconds }) => [
        ...(several ? [`${replica + 1}`] : []),
        worker,
        `${first}–${end - 1}`,
        bytes(Math.round(memoryBytes)),
        bytes(byId.get(worker)!.memoryBytes),
        ms(byId.get(worker)!.speed?.layerSeconds),
        ms(byId.get(worker)!.speed?.headSeconds),
        ms(byId.get(worker)!.hopSeconds ?? options.hopSeconds),
        (1000 * seconds).toFixed(2),
      ]),
    ),
    ...(idle.length === 0 ? [] : [`without layers: ${idle.join(", ")}`]),
    "",
    `one stream ${rate(oneStream)} tok/s, many together ${
      rate(manyStreams)
    } tok/s (unbatched); without ms/layer as far ` +
    "as memory and hops go",
  ].join("\n"));
}

function rate(value: number): string {
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

function parseKvType(text: string): PlanFlags["kvType"] {
  if (text !== "f16" && text !== "f32" && text !== "q8") throw new InvalidArgumentError("It must be f16, f32 or q8.");
  return text;
}

function parseDevices(text: string, index: number): Device[] {
  const found = /^(?:(\d+)x)?(\d+(?:\.\d+)?)GB:(\d+(?:\.\d+)?)GBps$/i.exec(text);
  const [count, memory, bandwidth] = [Number(found?.[1] ?? 1), Number(found?.[2]), Number(found?.[3])];
  if (!(memory > 0 && bandwidth > 0 && count >= 1 && count <= 1000)) {
    throw new InvalidArgumentError("It must be like 8GB:12GBps, or 4x8GB:12GBps.");
  }
  return Array.from({ length: count }, (_, i) => ({
    ...{ id: `device-${index + i + 1}`, memoryBytes: memory * 1e9, bandwidthGBps: bandwidth },
  }));
}
