import assert from "node:assert/strict";
import type { ClusterStatus } from "../bus/mod.ts";
import { describeStatus } from "./status.ts";

const worker = (id: string, replica: number | null): ClusterStatus["workers"][number] => ({
  ...{ id, state: "ready", isa: "neon", cores: 4, memoryBytes: 4e9, bandwidthGBps: 12, msPerLayer: 0.5, msHead: 1 },
  ...{ seenMs: 100, queued: 0, replica, layers: replica === null ? [] : [[0, 6]], stepMs: replica === null ? [] : [4] },
  ...{ rttMs: 0.5, bubble: null, loading: null },
});

const status = (replicas: ClusterStatus["replicas"], workers: ClusterStatus["workers"]): ClusterStatus => ({
  ...{ orchestrator: "o", model: "m", state: "serving", reason: "", epoch: 4, running: 3, waiting: 1, recoveries: 0 },
  ...{ lastRecoveryMs: null, replicas, workers },
});

Deno.test("status: of several replicas each is shown, and which device is whose; of one there is nothing to say", () => {
  const serving = { state: "serving", epoch: 4, running: 3, waiting: 1 } as const;
  const loading = { state: "loading", epoch: 0, running: 0, waiting: 0 } as const;
  const text = describeStatus(status([serving, loading], [worker("a", 0), worker("b", 1), worker("c", null)]));
  assert.match(text, /^replica 1: serving, epoch 4, 3 run, 1 wait\nreplica 2: loading, epoch 0, 0 run, 0 wait$/m);
  assert.match(text, /^device +state +replica +layers/m);
  assert.match(text, /^a +ready +1 +0–5 /m);
  assert.match(text, /^b +ready +2 +0–5 /m);
  assert.match(text, /^c +ready +– +– /m);
  assert.doesNotMatch(describeStatus(status([serving], [worker("a", 0)])), /replica/);
});
