/**
 * The fault matrix: what is broken in the midst of answers, and what it costs. Tokens are compared with those of one process.
 *
 * @module
 */
import { startLocalCluster } from "../../cli/local_cluster.ts";
import { ClusterError } from "../../orchestrator/mod.ts";
import type { Engine, GenerateRequest } from "../../orchestrator/mod.ts";
import { FaultCluster, MODEL } from "./harness.ts";

/** Sums over the runs of one fault. */
export interface FaultRow {
  fault: string;
  runs: number;
  /** Tokens that never came, came once more than they should, or are others than those of one process. */
  lost: number;
  repeated: number;
  changed: number;
  /** The slowest detection and recovery, in milliseconds; `null` when nothing had to be noticed. */
  detect_ms: number | null;
  recover_ms: number | null;
}

const STREAMS = 4;
const TOKENS = 160;
/** Milliseconds after which an answer counts as never coming. */
const PATIENCE_MS = 60_000;
/** Milliseconds after the answers in which a fault must have been noticed. */
const NOTICE_MS = 5000;

export function requests(promptTokens: number): GenerateRequest[] {
  return Array.from({ length: STREAMS }, (_, n) => ({
    promptTokens: Array.from({ length: promptTokens }, (_, i) => 10 + (i * 37 + n * 101) % 900),
    maxTokens: TOKENS,
    ignoreEos: true,
    sampling: n % 2 === 0 ? { temperature: 0 } : { temperature: 1, seed: BigInt(n) },
  }));
}

/** The tokens of an answer. */
export async function tokens(engine: Engine, request: GenerateRequest): Promise<number[]> {
  const ids: number[] = [];
  for await (const event of engine.generate(request)) if (event.type === "token") ids.push(event.id);
  return ids;
}

/**
 * A client's view of an answer. When the orchestrator goes down with it, the client asks its successor for the rest: an answer
 * goes on from its tokens, whoever computes them.
 */
export async function received(
  cluster: FaultCluster,
  request: GenerateRequest,
  onToken: () => void,
): Promise<number[]> {
  const ids: number[] = [];
  const deadline = performance.now() + PATIENCE_MS;
  while (ids.length < TOKENS) {
    const { engine } = cluster;
    const promptTokens = [...request.promptTokens, ...ids];
    try {
      for await (const event of engine.generate({ ...request, promptTokens, maxTokens: TOKENS - ids.length })) {
        if (event.type !== "token") continue;
        ids.push(event.id);
        onToken();
      }
    } catch (error) {
      if (!(error instanceof ClusterError) || performance.now() > deadline) throw error;
      while (cluster.engine === engine && performance.now() < deadline) await pause();
    }
  }
  return ids;
}

const pause = () => new Promise((resolve) => setTimeout(resolve, 10));

export interface Fault {
  /** Nothing is lost: it must not be noticed. */
  harmless?: boolean;
  /** Breaks something. */
  act(cluster: FaultCluster): Promise<void> | void;
  /** Makes it whole again for the next run. */
  mend?(cluster: FaultCluster): Promise<void> | void;
  /** Breaks a cluster of replicas, each on a device of its own, rather than a pipeline of two stages with devices to spare. */
  replicas?: boolean;
  /** Breaks before the first token, while a long prompt is computed. */
  prefill?: boolean;
  /** What it needs of the system. */
  needs?: "namespaces" | "control groups";
}

/** Starts every device that has ended again. */
async function restart(cluster: FaultCluster, ...stages: string[]): Promise<void> {
  for (const id of stages) {
    const device = cluster.devices.find((other) => other.id === id)!;
    device.kill("SIGKILL");
    await device.ended();
    device.start();
  }
}

const DEVICES = 4;
const REPLICAS = 3;

let broken: string[] = [];
const mend = (cluster: FaultCluster) => restart(cluster, ...broken);
const strike = (cluster: FaultCluster, signal: Deno.Signal, ...stages: number[]) => {
  const devices = stages.map((stage) => cluster.holder(stage));
  broken = devices.map((device) => device.id);
  for (const device of devices) device.kill(signal);
};

/** All faults, by name. */
export const FAULTS: Readonly<Record<string, Fault>> = {
  "SIGKILL of the first stage": { act: (c) => strike(c, "SIGKILL", 0), mend },
  "SIGKILL of the last stage": { act: (c) => strike(c, "SIGKILL", 1), mend },
  "SIGKILL in prefill": { act: (c) => strike(c, "SIGKILL", 1), mend, prefill: true },
  "SIGKILL in weight transfer": {
    act: async (c) => {
      for (const device of c.devices) device.forget();
      c.chunkMs = 100;
      strike(c, "SIGKILL", 0);
      // Who fetches the lost layers is lost as well.
      const fetching = () => c.engine.state.loading.find(({ phase }) => phase === "fetching");
      for (const deadline = performance.now() + 20_000; fetching() === undefined; await pause()) {
        if (performance.now() > deadline) throw new Error("nobody fetches weights");
      }
      const { worker } = fetching()!;
      broken.push(worker);
      c.devices.find((device) => device.id === worker)!.kill("SIGKILL");
      c.chunkMs = 0;
    },
    mend,
  },
  "SIGSTOP": { act: (c) => strike(c, "SIGSTOP", 1), mend: (c) => c.devices.forEach((d) => d.kill("SIGCONT")) },
  "SIGTERM": { act: (c) => strike(c, "SIGTERM", 0), mend },
  "two losses at once": { act: (c) => strike(c, "SIGKILL", 0, 1), mend },
  "worker rejoins": {
    act: async (c) => {
      strike(c, "SIGKILL", 0);
      await mend(c);
    },
  },
  "link down": {
    act: async (c) => {
      const device = c.holder(1);
      broken = [device.id];
      await device.link!.set("down");
    },
    mend: (c) => c.devices.find((device) => device.id === broken[0])!.link!.set("up"),
    needs: "namespaces",
  },
  "link down, killed and started again": {
    act: async (c) => {
      const device = c.holder(1);
      await device.link!.set("down");
      await new Promise((resolve) => setTimeout(resolve, 2500)); // its heartbeats wait in its socket
      await restart(c, device.id);
      await new Promise((resolve) => setTimeout(resolve, 1500)); // and outlive it
      await device.link!.set("up");
    },
    needs: "namespaces",
  },
  "a quarter of the CPU": {
    act: async (c) => {
      for (const stage of [0, 1]) await c.holder(stage).limit(stage === 0 ? 0.25 : undefined);
    },
    mend: async (c) => {
      for (const device of c.devices) await device.limit(undefined);
    },
    harmless: true,
    needs: "control groups",
  },
  "orchestrator restart": {
    act: async (c) => {
      await c.shut();
      c.events.length = 0; // of the one that is gone
      await c.open({ workers: 2 });
    },
  },
  "broker restart": {
    act: (c) => c.restartServer(),
  },
  "replicas: SIGKILL of one": { act: (c) => strike(c, "SIGKILL", 0), mend, replicas: true },
  "replicas: SIGKILL of all but one": { act: (c) => strike(c, "SIGKILL", 0, 2), mend, replicas: true },
  "replicas: SIGTERM of one": { act: (c) => strike(c, "SIGTERM", 1), mend, replicas: true },
  "replicas: one rejoins": {
    act: async (c) => {
      strike(c, "SIGKILL", 1);
      await mend(c);
    },
    replicas: true,
  },
  "replicas: orchestrator restart": {
    act: async (c) => {
      await c.shut();
      c.events.length = 0;
      await c.open({ workers: REPLICAS });
    },
    replicas: true,
  },
};

/** Resolves when so many workers are there, and so many replicas serve. */
export async function gathered(cluster: FaultCluster, count: number, replicas = 1): Promise<void> {
  const deadline = performance.now() + 60_000;
  for (;; await new Promise((resolve) => setTimeout(resolve, 50))) {
    const status = cluster.engine.clusterStatus();
    const there = status.workers.filter(({ state }) => state === "ready").length;
    const serving = status.replicas.filter(({ state }) => state === "serving").length;
    if (there >= count && serving === replicas) return;
    if (performance.now() > deadline) {
      throw new Error(`${there} of ${count} workers came back, and ${serving} of ${replicas} replicas`);
    }
  }
}

/** Runs the matrix and yields a row for every fault. */
export async function* runFaults(runs: number, only?: readonly string[]): AsyncGenerator<FaultRow> {
  const expected = new Map<boolean, number[][]>();
  {
    await using one = await startLocalCluster(MODEL, { threads: 1, context: 512, kvTokens: 4096 });
    for (const prefill of [false, true]) {
      const all = requests(prefill ? 340 : 12).map((request) => tokens(one.engine, request));
      expected.set(prefill, await Promise.all(all));
    }
  }
  for (const replicas of [false, true]) {
    const faults = Object.entries(FAULTS).filter(([name, fault]) =>
      (fault.replicas === true) === replicas && (only === undefined || only.includes(name))
    );
    if (faults.length === 0) continue;
    const devices = replicas ? REPLICAS : DEVICES;
    await using cluster = await FaultCluster.start(devices, replicas ? {} : { shards: 2 });
    const whole = () => gathered(cluster, devices, replicas ? REPLICAS : 1);
    await whole();
    yield* runRounds(cluster, faults, runs, expected, whole);
  }
}

async function* runRounds(
  cluster: FaultCluster,
  faults: readonly (readonly [string, Fault])[],
  runs: number,
  expected: ReadonlyMap<boolean, number[][]>,
  whole: () => Promise<void>,
): AsyncGenerator<FaultRow> {
  for (const [name, fault] of faults) {
    const [device] = cluster.devices;
    const able = { "namespaces": device!.link !== undefined, "control groups": await device!.limit(undefined) };
    if (fault.needs !== undefined && !able[fault.needs]) {
      console.error(`${name}: left out, for want of root or ${fault.needs}`);
      continue;
    }
    const row: FaultRow = { fault: name, runs, lost: 0, repeated: 0, changed: 0, detect_ms: null, recover_ms: null };
    const prefill = fault.prefill === true;
    for (let run = 0; run < runs; run++) {
      cluster.events.length = 0;
      let struck: Promise<void> | undefined;
      let at = 0;
      const act = () => {
        at = performance.now();
        struck = Promise.resolve(fault.act(cluster));
      };
      let seen = 0;
      const wait = 4 + (run * 7) % 40; // tokens before the fault; another moment in every run
      const answers = Promise.all(
        requests(prefill ? 340 : 12).map((request) =>
          received(cluster, request, () => {
            if (++seen === wait * STREAMS && !prefill) act();
          })
        ),
      );
      if (prefill) setTimeout(act, 5);
      const got = await answers;
      await struck;
      got.forEach((ids, n) => {
        const right = expected.get(prefill)![n]!;
        row.lost += Math.max(0, right.length - ids.length);
        row.repeated += Math.max(0, ids.length - right.length);
        row.changed += ids.filter((id, i) => id !== right[i]).length;
      });
      // Where others had the layers already, the answers may have come first.
      const recovered = ({ text }: { text: string }) => /^goes on|^serves/.test(text);
      for (const until = performance.now() + NOTICE_MS; performance.now() < until; await pause()) {
        if (fault.harmless === true || cluster.events.some(recovered)) break;
      }
      const noticed = cluster.events.find(({ text }) => text.endsWith(": placing anew"));
      const went = cluster.events.findLast(recovered);
      if (fault.harmless === true && noticed !== undefined) throw new Error(`${name}: ${noticed.text}`);
      if (noticed !== undefined) row.detect_ms = Math.max(row.detect_ms ?? 0, Math.round(noticed.at - at));
      if (went !== undefined) row.recover_ms = Math.max(row.recover_ms ?? 0, Math.round(went.at - at));
      await fault.mend?.(cluster);
      await whole();
    }
    yield row;
  }
}
