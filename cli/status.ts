import { InvalidArgumentError } from "commander";
import type { Command } from "commander";
import process from "node:process";
import { BusError, clusterStatusSchema, clusterSubjects, decodeJson, NatsBus, NoRespondersError } from "../bus/mod.ts";
import type { ClusterStatus } from "../bus/mod.ts";
import { ClusterError } from "../orchestrator/mod.ts";
import { bytes, table } from "./inspect.ts";
import { natsAddress, natsOptions, withNatsOptions } from "./nats_options.ts";
import type { NatsFlags } from "./nats_options.ts";
import { number } from "./options.ts";

interface StatusFlags extends NatsFlags {
  once?: boolean;
  json?: boolean;
  every: number;
}

const REQUEST_MS = 2000;

/** Adds the command `status`. */
export function addStatus(program: Command): void {
  const command = program.command("status")
    .description("show a cluster's devices, what they hold and how they do; on a terminal until Ctrl-C")
    .option("--once", "show it once, as is done where the output is no terminal")
    .option("--every <seconds>", "how often to look", number(0.1, 3600), 1)
    .option("--json", "print JSON, once");
  withNatsOptions(command, "address of the cluster's NATS server").action(async (flags: StatusFlags) => {
    const address = natsAddress(flags);
    if (address === undefined) throw new InvalidArgumentError("--nats says where the cluster's NATS server is.");
    const bus = await NatsBus.connect({ ...natsOptions(flags, address), name: "lutra-status" });
    try {
      if (flags.json === true) console.log(JSON.stringify(await clusterStatus(bus, flags.cluster)));
      else if (flags.once === true || !process.stdout.isTTY) {
        console.log(describeStatus(await clusterStatus(bus, flags.cluster)));
      } else await watch(bus, flags);
    } finally {
      await bus.close();
    }
  });
}

/**
 * Asks the orchestrator.
 *
 * @throws {ClusterError} when nobody serves the cluster.
 */
export async function clusterStatus(bus: NatsBus, cluster: string): Promise<ClusterStatus> {
  const subject = clusterSubjects(cluster).orchestrator;
  const answer = await bus.request(subject, new Uint8Array(), { timeoutMs: REQUEST_MS }).catch((cause) => {
    if (!(cause instanceof NoRespondersError)) throw cause;
    throw new ClusterError(`nobody serves cluster ${cluster}: start \`serve MODEL --nats …\``, { cause });
  });
  return decodeJson(clusterStatusSchema, answer.data);
}

/** Draws the table again and again, in place, until the process is told to stop. */
async function watch(bus: NatsBus, { cluster, every }: StatusFlags): Promise<void> {
  const { promise: stopped, resolve } = Promise.withResolvers<"stopped">();
  const stop = () => resolve("stopped");
  const signals: Deno.Signal[] = Deno.build.os === "windows" ? ["SIGINT"] : ["SIGINT", "SIGTERM"];
  for (const signal of signals) Deno.addSignalListener(signal, stop);
  try {
    for (let first = true;; first = false) {
      let text: string;
      try {
        text = describeStatus(await clusterStatus(bus, cluster));
      } catch (error) {
        if (!(error instanceof ClusterError || error instanceof BusError)) throw error;
        text = error.message; // it may come, or come again
      }
      const lines = text.split("\n").map((line) => `${line}\x1b[K\n`).join("");
      process.stdout.write(`${first ? "\x1b[2J" : ""}\x1b[H${lines}\x1b[J`);
      let timer: ReturnType<typeof setTimeout> | undefined;
      const pause = new Promise<"again">((again) => timer = setTimeout(() => again("again"), 1000 * every));
      const next = await Promise.race([stopped, pause]);
      clearTimeout(timer);
      if (next === "stopped") return;
    }
  } finally {
    for (const signal of signals) Deno.removeSignalListener(signal, stop);
  }
}

/** A cluster's state as text. */
export function describeStatus(status: ClusterStatus): string {
  const { model, state, reason, epoch, running, waiting, recoveries, lastRecoveryMs, replicas } = status;
  const several = replicas.length > 1;
  const again = lastRecoveryMs === null ? "" : `, the last in ${Math.round(lastRecoveryMs)} ms`;
  const or = (value: number | null, show: (value: number) => string) => value === null ? "–" : show(value);
  return [
    `${model}: ${state}${reason === "" ? "" : ` (${reason})`}, epoch ${epoch}`,
    `${running} requests run, ${waiting} wait; ${recoveries} recoveries${again}`,
    ...(several
      ? replicas.map((replica, i) =>
        `replica ${i + 1}: ${replica.state}, epoch ${replica.epoch}, ${replica.running} run, ${replica.waiting} wait`
      )
      : []),
    "",
    ...table(
      [
        "device",
        "state",
        ...(several ? ["replica"] : []),
        "layers",
        "ms/step",
        "hop RTT",
        "queue",
        "bubbles",
        "ISA",
        "cores",
        "memory",
        "GB/s",
        "ms/layer",
        "head",
        "seen",
      ],
      status.workers.map((worker) => [
        worker.id,
        worker.loading === null ? worker.state : `${worker.loading.phase} ${Math.floor(100 * worker.loading.share)} %`,
        ...(several ? [worker.replica === null ? "–" : `${worker.replica + 1}`] : []),
        worker.layers.map(([first, end]) => `${first}–${end - 1}`).join(", ") || "–",
        worker.stepMs.map((ms) => or(ms, (value) => value.toFixed(2))).join(", ") || "–",
        or(worker.rttMs, (ms) => `${ms.toFixed(2)} ms`),
        `${worker.queued}`,
        or(worker.bubble, (share) => `${Math.round(100 * share)} %`),
        worker.isa,
        `${worker.cores}`,
        bytes(worker.memoryBytes),
        or(worker.bandwidthGBps, (value) => value.toFixed(1)),
        or(worker.msPerLayer, (value) => value.toFixed(3)),
        or(worker.msHead, (value) => value.toFixed(3)),
        `${(worker.seenMs / 1000).toFixed(1)} s`,
      ]),
    ),
  ].join("\n");
}
