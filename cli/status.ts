import { InvalidArgumentError } from "commander";
import type { Command } from "commander";
import { clusterStatusSchema, clusterSubjects, decodeJson, NatsBus, NoRespondersError } from "../bus/mod.ts";
import type { ClusterStatus } from "../bus/mod.ts";
import { ClusterError } from "../orchestrator/mod.ts";
import { bytes, table } from "./inspect.ts";
import { natsAddress, natsOptions, withNatsOptions } from "./nats_options.ts";
import type { NatsFlags } from "./nats_options.ts";

/** Adds the command `status`. */
export function addStatus(program: Command): void {
  const command = program.command("status")
    .description("show a cluster's devices and what they hold")
    .option("--json", "print JSON");
  withNatsOptions(command, "address of the cluster's NATS server").action(
    async (flags: NatsFlags & { json?: boolean }) => {
      const address = natsAddress(flags);
      if (address === undefined) throw new InvalidArgumentError("--nats says where the cluster's NATS server is.");
      const bus = await NatsBus.connect(natsOptions(flags, address));
      try {
        const subject = clusterSubjects(flags.cluster).orchestrator;
        const answer = await bus.request(subject, new Uint8Array(), { timeoutMs: 2000 }).catch((cause) => {
          if (!(cause instanceof NoRespondersError)) throw cause;
          throw new ClusterError(`nobody serves cluster ${flags.cluster}: start \`serve MODEL --nats …\``, { cause });
        });
        const status = decodeJson(clusterStatusSchema, answer.data);
        console.log(flags.json === true ? JSON.stringify(status) : describe(status));
      } finally {
        await bus.close();
      }
    },
  );
}

function describe(status: ClusterStatus): string {
  const { model, state, reason, epoch, running, waiting, recoveries, lastRecoveryMs } = status;
  const again = lastRecoveryMs === null ? "" : `, the last in ${Math.round(lastRecoveryMs)} ms`;
  return [
    `${model}: ${state}${reason === "" ? "" : ` (${reason})`}, epoch ${epoch}`,
    `${running} requests run, ${waiting} wait; ${recoveries} recoveries${again}`,
    "",
    ...table(
      ["device", "state", "layers", "ISA", "cores", "memory", "GB/s", "queue", "seen"],
      status.workers.map((worker) => [
        worker.id,
        worker.state,
        worker.layers.map(([first, end]) => `${first}–${end - 1}`).join(", ") || "–",
        worker.isa,
        `${worker.cores}`,
        bytes(worker.memoryBytes),
        worker.bandwidthGBps === null ? "–" : worker.bandwidthGBps.toFixed(1),
        `${worker.queued}`,
        `${(worker.seenMs / 1000).toFixed(1)} s`,
      ]),
    ),
  ].join("\n");
}
