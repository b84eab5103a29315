import assert from "node:assert/strict";
import { setImmediate } from "node:timers";
import { decodeBatch } from "../bus/mod.ts";
import type { DecodedBatch, EntryResult, SampleParameters } from "../bus/mod.ts";
import { QueueFullError } from "./errors.ts";
import type { StepRunner } from "./pipeline.ts";
import { Scheduler } from "./scheduler.ts";
import type { Job, SchedulerOptions } from "./scheduler.ts";

const sample: SampleParameters = {
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  repeatPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  penaltyLastN: 0,
  promptLength: 1,
  seed: 0n,
  logitBias: new Map(),
};

/** A pipeline that answers when told to: every sampled token is the position it follows. */
class ManualRunner implements StepRunner {
  readonly blockTokens = 4;
  readonly sent: { batch: DecodedBatch; answer: () => void; fail: (error: Error) => void }[] = [];
  readonly released: number[] = [];
  #answered = 0;

  constructor(readonly stages: number, readonly kvBlocks: number) {}

  run(bytes: Uint8Array): Promise<EntryResult[]> {
    const batch = decodeBatch(bytes);
    return new Promise((resolve, reject) => {
      const answer = () =>
        resolve(
          batch.entries.filter(({ seq }) => !this.released.includes(seq)).map((entry): EntryResult => ({
            seq: entry.seq,
            pos: entry.pos,
            tokenCount: entry.tokenCount,
            ...(entry.sampled ? { sampled: { id: entry.pos + entry.tokenCount, logprob: 0, top: [] } } : {}),
            ...(entry.logits ? { logits: new Float32Array(entry.tokenCount) } : {}),
          })),
        );
      this.sent.push({ batch, answer, fail: reject });
    });
  }

  release(seqs: readonly number[]): void {
    this.released.push(...seqs);
  }

  /** Micro-batches not answered yet. */
  get open(): number {
    return this.sent.length - this.#answered;
  }

  /** Answers the oldest and lets the scheduler react. Returns what was answered as `seq@pos+tokens`. */
  async step(): Promise<string[]> {
    const { batch, answer } = this.sent[this.#answered++]!;
    answer();
    await turn();
    return shape(batch);
  }
}

const turn = () => new Promise<void>((resolve) => setImmediate(resolve));
const shape = (batch: DecodedBatch) => batch.entries.map((entry) => `${entry.seq}@${entry.pos}+${entry.tokenCount}`);

function scheduler(runner: StepRunner, options: Partial<SchedulerOptions> = {}): Scheduler {
  return new Scheduler(runner, {
    maxBatch: 16,
    maxRunning: 100,
    maxQueued: 100,
    maxKept: 0,
    maxPayload: 1 << 20,
    hiddenBytes: 16,
    vocab: 1000,
    ...options,
  });
}

interface Recorded extends Job {
  readonly got: number[];
  readonly errors: string[];
}

/** A job of `length` tokens that wants `count` more. */
function job(length: number, count: number): Recorded {
  const got: number[] = [];
  const errors: string[] = [];
  return {
    tokens: new Array(length).fill(1),
    sample,
    got,
    errors,
    onToken: ({ id }) => got.push(id) < count,
    onError: (error) => errors.push(error.message),
  };
}

/** Runs to the end and returns all micro-batches. */
async function finish(runner: ManualRunner): Promise<string[][]> {
  await turn();
  const all: string[][] = [];
  while (runner.open > 0) {
    all.push(await runner.step());
    assert(all.length < 10_000, "no end");
  }
  return all;
}

function range(start: number, count: number): number[] {
  return Array.from({ length: count }, (_, i) => start + i);
}

Deno.test("Scheduler: a prompt goes in chunks, at most one more than there are stages at once, then tokens one by one", async () => {
  const runner = new ManualRunner(2, 100);
  const s = scheduler(runner);
  const a = job(60, 3);
  s.add(a);
  await turn();
  assert.equal(runner.open, 3);
  assert.deepEqual(await finish(runner), [["1@0+16"], ["1@16+16"], ["1@32+16"], ["1@48+12"], ["1@60+1"], ["1@61+1"]]);
  assert.deepEqual(a.got, [60, 61, 62]);
  assert.deepEqual(runner.released, [1]);
  assert.equal(s.stats.kvBlocksUsed, 0);
});

Deno.test("Scheduler: what arrives in one turn shares the first micro-batch", async () => {
  const runner = new ManualRunner(1, 100);
  const s = scheduler(runner);
  for (const length of [3, 4, 5]) s.add(job(length, 1));
  assert.deepEqual(await finish(runner), [["1@0+3", "2@0+4", "3@0+5"]]);
});

Deno.test("Scheduler: decode comes before prefill, which fills the rest", async () => {
  const runner = new ManualRunner(1, 1000);
  const s = scheduler(runner);
  s.add(job(1, 20));
  s.add(job(1, 20));
  await turn();
  await runner.step();
  s.add(job(40, 1));
  await turn();
  await runner.step();
  assert.deepEqual(shape(runner.sent[2]!.batch), ["1@2+1", "2@2+1", "3@0+14"]);
  const rest = await finish(runner);
  assert.deepEqual(rest.slice(0, 3), [
    ["1@2+1", "2@2+1", "3@0+14"],
    ["1@3+1", "2@3+1", "3@14+14"],
    ["1@4+1", "2@4+1", "3@28+12"],
  ]);
});

Deno.test("Scheduler: decoding sequences are spread evenly over the stages, however they began", async () => {
  for (const [stages, streams] of [[1, 5], [2, 8], [3, 8], [4, 2]] as const) {
    const runner = new ManualRunner(stages, 1000);
    const s = scheduler(runner);
    for (let i = 0; i < streams; i++) {
      s.add(job(1 + 5 * i, 200));
      if (i % 2) await turn();
    }
    for (let i = 0; i < 60; i++) await runner.step();
    const groups = runner.sent.slice(-runner.open).map(({ batch }) => batch.entries.length);
    assert.equal(groups.length, Math.min(stages, streams));
    assert.equal(groups.reduce((sum, n) => sum + n), streams, "none waits");
    assert(Math.max(...groups) <= Math.ceil(streams / stages), `${stages} stages: ${groups}`);
    s.close(new Error("end"));
  }
});

Deno.test("Scheduler: a short prompt does not wait for a long one, and prefill is not starved by decode", async () => {
  const runner = new ManualRunner(1, 1000);
  const s = scheduler(runner, { maxBatch: 4 });
  s.add(job(200, 1));
  await turn();
  await runner.step();
  s.add(job(6, 1));
  await turn();
  const before = runner.sent.length;
  const served = (await finish(runner)).findIndex((entries) => entries.some((entry) => entry === "2@4+2"));
  assert(served <= before + 4, `served in step ${served}`);

  const small = new ManualRunner(1, 1000);
  const t = scheduler(small, { maxBatch: 2 });
  const streams = [job(1, 1000), job(1, 1000), job(1, 1000)];
  streams.forEach((stream) => t.add(stream));
  await turn();
  for (let i = 0; i < 10; i++) await small.step();
  const late = job(3, 1);
  t.add(late);
  await turn();
  for (let i = 0; i < 30; i++) await small.step();
  assert.deepEqual(late.got, [3]);
  t.close(new Error("end"));
});

Deno.test("Scheduler: when blocks run out the youngest gives way and is computed anew; no token is lost or repeated", async () => {
  const runner = new ManualRunner(1, 6); // 24 tokens
  const s = scheduler(runner);
  const jobs = [job(4, 15), job(5, 10), job(2, 6)];
  jobs.forEach((j) => s.add(j));
  await finish(runner);
  assert(s.stats.preemptions > 0);
  assert.deepEqual(jobs.map((j) => j.got), [range(4, 15), range(5, 10), range(2, 6)]);
  assert.equal(new Set(runner.released).size, runner.released.length, "numbers never come back");
  assert.equal(s.stats.kvBlocksUsed, 0);
});

Deno.test("Scheduler: never more blocks than there are, with random jobs and cancels", async () => {
  let x = 9;
  const next = (n: number) => (x = (Math.imul(x, 1664525) + 1013904223) >>> 0) % n;
  for (let round = 0; round < 60; round++) {
    const runner = new ManualRunner(1 + next(4), 4 + next(8));
    const s = scheduler(runner, { maxBatch: 1 + next(12), maxRunning: 1 + next(8) });
    const jobs = Array.from({ length: 10 }, () => {
      const length = 1 + next(12);
      return { length, count: 1 + next(16 - length), cancelled: false };
    }).map((plan) => ({ plan, job: job(plan.length, plan.count) }));
    for (const { job } of jobs) s.add(job);
    await turn();
    for (let i = 0; runner.open > 0; i++) {
      await runner.step();
      assert(s.stats.kvBlocksUsed <= runner.kvBlocks);
      if (i % 5 === 4) {
        const victim = jobs[next(jobs.length)]!;
        if (victim.job.got.length < victim.plan.count) victim.plan.cancelled = true;
        s.cancel(victim.job);
        await turn();
      }
      assert(i < 5000, "no end");
    }
    for (const { plan, job } of jobs) {
      assert.deepEqual(job.errors, []);
      assert.deepEqual(job.got, range(plan.length, plan.cancelled ? job.got.length : plan.count));
    }
    assert.deepEqual([s.stats.kvBlocksUsed, s.stats.running, s.stats.waiting], [0, 0, 0]);
  }
});

Deno.test("Scheduler: a sequence that can never fit fails instead of waiting for ever", async () => {
  const runner = new ManualRunner(1, 2);
  const s = scheduler(runner);
  const [tooLong, grows, fits] = [job(8, 1), job(6, 5), job(2, 2)];
  [tooLong, grows, fits].forEach((j) => s.add(j));
  await finish(runner);
  assert.match(tooLong.errors[0]!, /a sequence of 8 tokens and the next exceeds the KV cache of 8/);
  assert.match(grows.errors[0]!, /exceeds the KV cache/);
  assert.deepEqual(fits.got, [2, 3]);
});

Deno.test("Scheduler: the queue's limit counts those that wait, not those that run", async () => {
  const runner = new ManualRunner(1, 100);
  const s = scheduler(runner, { maxRunning: 2, maxQueued: 1 });
  const jobs = [job(1, 2), job(1, 2), job(1, 2)];
  jobs.forEach((j) => s.add(j));
  assert.throws(() => s.add(job(1, 1)), QueueFullError);
  await finish(runner);
  jobs.forEach((j) => assert.deepEqual(j.got, [1, 2]));
});

Deno.test("Scheduler: a failed micro-batch fails its jobs, frees them, and others go on", async () => {
  const runner = new ManualRunner(2, 100);
  const s = scheduler(runner, { maxBatch: 4 });
  const [a, b] = [job(4, 2), job(4, 2)];
  s.add(a);
  s.add(b);
  await turn();
  runner.sent[0]!.fail(new Error("stage 1 failed"));
  await finish(runner);
  assert.deepEqual([a.errors, a.got], [["stage 1 failed"], []]);
  assert.deepEqual([b.errors, b.got], [[], [4, 5]]);
  assert.deepEqual(runner.released, [1, 2]);
});

Deno.test("Scheduler: a job whose taker throws fails alone", async () => {
  const runner = new ManualRunner(1, 100);
  const s = scheduler(runner);
  const [a, b] = [job(1, 2), job(1, 2)];
  a.onToken = () => {
    throw new Error("decoder broke");
  };
  s.add(a);
  s.add(b);
  await finish(runner);
  assert.deepEqual([a.errors, b.got], [["decoder broke"], [1, 2]]);
});

Deno.test("Scheduler.replace: on another pipeline every sequence goes on from its token ids", async () => {
  const lost = new ManualRunner(2, 100);
  const s = scheduler(lost);
  const jobs = [job(20, 6), job(1, 9), job(3, 4)];
  jobs.forEach((j) => s.add(j));
  await turn();
  for (let i = 0; i < 5; i++) await lost.step();
  const before = jobs.map((j) => j.got.length);
  assert(before.some((n) => n > 0) && before.every((n, i) => n < [6, 9, 4][i]!), `${before}`);
  const fresh = new ManualRunner(3, 50);
  s.replace(fresh);
  await turn();
  while (lost.open > 0) await lost.step(); // too late: of no account
  assert.deepEqual(jobs.map((j) => j.got.length), before);
  await finish(fresh);
  assert.deepEqual(jobs.map((j) => j.got), [range(20, 6), range(1, 9), range(3, 4)]);
  assert.equal(s.stats.kvBlocksUsed, 0);
});

Deno.test("Scheduler: logits come for every position, in chunks that fit the result", async () => {
  const runner = new ManualRunner(1, 100);
  const s = scheduler(runner, { vocab: 1000, maxPayload: 20_000 });
  const seen: number[] = [];
  let done = 0;
  s.add({
    tokens: new Array(11).fill(1),
    onLogits: (pos, logits) => seen.push(...range(pos, logits.length)),
    onDone: () => done++,
    onError: (error) => assert.fail(error),
  });
  assert.deepEqual(await finish(runner), [["1@0+4"], ["1@4+4"], ["1@8+3"]]);
  assert.deepEqual([seen, done], [range(0, 11), 1]);
});

Deno.test("Scheduler: a job goes on with the kept sequence that has most of its tokens; kept ones make room, the oldest first", async () => {
  const runner = new ManualRunner(2, 20); // of 4 tokens
  const s = scheduler(runner, { maxKept: 2 });
  const first = job(20, 3); // then 20, 21 and 22
  s.add(first);
  await finish(runner);
  assert.deepEqual([s.stats.kept, s.stats.kvBlocksKept, s.stats.kvBlocksUsed, runner.released], [1, 6, 0, []]);
  // The last token sampled was never computed.
  const next = { ...job(0, 1), tokens: [...first.tokens, 5, 5] };
  s.add(next);
  assert.deepEqual(await finish(runner), [["1@22+3"]]);
  assert.equal(s.stats.reusedTokens, 22);
  // Without a token of its own: the last of all is computed again.
  s.add({ ...job(0, 1), tokens: first.tokens.slice(0, 20) });
  assert.deepEqual(await finish(runner), [["1@19+1"]]);
  assert.deepEqual([s.stats.kept, s.stats.kvBlocksKept], [1, 5]);
  // Others have nothing in common with it; there may be two.
  for (const token of [2, 3]) {
    s.add({ ...job(0, 1), tokens: new Array(16).fill(token) });
    await finish(runner);
  }
  assert.deepEqual([s.stats.kept, runner.released], [2, [1]]);
  // All the room is wanted.
  const large = job(70, 2);
  s.add(large);
  await finish(runner);
  assert.deepEqual(large.errors, []);
  assert.deepEqual([s.stats.kept, s.stats.kvBlocksUsed, runner.released], [1, 0, [1, 2, 3]]);
  assert.equal(s.stats.preemptions, 0);
  // A pipeline that is replaced has none.
  s.replace(new ManualRunner(2, 20));
  assert.deepEqual([s.stats.kept, s.stats.kvBlocksKept], [0, 0]);
});

Deno.test("Scheduler: two jobs that begin as a kept sequence do not share it, and a long one is not lost to a short one", async () => {
  const runner = new ManualRunner(1, 100);
  const s = scheduler(runner, { maxKept: 4 });
  s.add(job(32, 1));
  await finish(runner);
  s.add(job(40, 1));
  s.add(job(40, 1));
  const steps = (await finish(runner)).flat();
  assert(steps.includes("1@32+8"), steps.join(" "));
  assert.deepEqual(steps.filter((step) => step.startsWith("1@")), ["1@32+8"]);
  assert(steps.some((step) => step.startsWith("2@0+")), steps.join(" "));
  s.add({ ...job(0, 1), tokens: [...new Array(18).fill(1), 7] });
  assert.deepEqual((await finish(runner)).flat(), ["3@0+16", "3@16+3"]);
});

Deno.test("Scheduler: what is cancelled while it is computed is not kept, what rests is", async () => {
  const runner = new ManualRunner(1, 100);
  const s = scheduler(runner, { maxKept: 4 });
  const a = job(16, 9);
  s.add(a);
  await turn();
  s.cancel(a);
  assert.deepEqual([s.stats.kept, runner.released], [0, [1]]);
  await finish(runner);
  assert.equal(s.stats.kvBlocksUsed, 0);
});
