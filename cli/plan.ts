import { InvalidArgumentError } from "commander";
import type { Command } from "commander";
import { loadModel } from "../model/mod.ts";
import { modelCost, place, stageCosts } from "../orchestrator/mod.ts";
import type { Device } from "../orchestrator/mod.ts";
import { modelPath } from "./hub/reference.ts";
import { bytes, table } from "./inspect.ts";
import { integer, withClusterOptions } from "./options.ts";
import type { ClusterFlags } from "./options.ts";

interface PlanFlags extends ClusterFlags {
  device: Device[];
  kvTokens?: number;
  json?: boolean;
}

/** Adds the command `plan`. */
export function addPlan(program: Command): void {
  const command = program.command("plan")
    .description("show how a model would be split over devices, and how fast memory would let it be")
    .argument("<model>", "a GGUF file, or hf:org/repo[:file] that was pulled")
    .requiredOption(
      "--device <memory:bandwidth>",
      "a device, as 8GB:12GBps; once for each",
      (text: string, before: Device[] = []) => [...before, parseDevice(text, before.length)],
    )
    .option("--kv-tokens <n>", "tokens that the KV cache holds over all requests", integer(2))
    .option("--json", "print JSON");
  withClusterOptions(command).action(async (path: string, flags: PlanFlags) => {
    const { description } = await loadModel(modelPath(path));
    const context = flags.context ?? Math.min(description.hyper.context, 8192);
    const cost = modelCost(description, {
      type: flags.kvType ?? "f16",
      tokens: flags.kvTokens ?? Math.max(context, 8192),
    });
    const stages = place(cost, flags.device, flags.shards === undefined ? {} : { shards: flags.shards });
    const costs = stageCosts(cost, flags.device, stages);
    const seconds = costs.map((stage) => stage.seconds);
    const plan = {
      stages: stages.map((stage, i) => ({ ...stage, ...costs[i]! })),
      /** By reading weights alone, without hops: one stream passes all stages, many keep the slowest busy. */
      oneStreamTokS: 1 / seconds.reduce((sum, value) => sum + value, 0),
      manyStreamsTokS: 1 / Math.max(...seconds),
    };
    if (flags.json === true) return console.log(JSON.stringify(plan));
    console.log([
      ...table(
        ["device", "layers", "memory", "ms a token"],
        plan.stages.map(({ worker, first, end, memoryBytes, seconds }) => [
          worker,
          `${first}–${end - 1}`,
          bytes(memoryBytes),
          (1000 * seconds).toFixed(2),
        ]),
      ),
      "",
      `one stream at most ${plan.oneStreamTokS.toFixed(1)} tok/s, many together (unbatched) ${
        plan.manyStreamsTokS.toFixed(1)
      } tok/s, as far as memory goes`,
    ].join("\n"));
  });
}

function parseDevice(text: string, index: number): Device {
  const found = /^(\d+(?:\.\d+)?)GB:(\d+(?:\.\d+)?)GBps$/i.exec(text);
  const [memory, bandwidth] = [Number(found?.[1]), Number(found?.[2])];
  if (!(memory > 0 && bandwidth > 0)) throw new InvalidArgumentError("It must be like 8GB:12GBps.");
  return { id: `device-${index + 1}`, memoryBytes: memory * 1e9, bandwidthGBps: bandwidth };
}
