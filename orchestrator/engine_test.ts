import assert from "node:assert/strict";
import { encodeMessage, InProcessBus } from "../bus/mod.ts";
import type { PublishOptions } from "../bus/mod.ts";
import { continuation, fakeCluster, fakeModel, LossyBus, read, settled, VOCAB } from "../tests/fakes/cluster.ts";
import { Engine } from "./engine.ts";
import { ClusterError, ContextLengthError, EngineClosedError, QueueFullError, RequestError } from "./errors.ts";

const greedy = { temperature: 0 } as const;
const prompt = [5, 6, 7];
/** Up to, and with, the first end-of-sequence token. */
function untilEos(tokens: number[]): number[] {
  const at = tokens.indexOf(0);
  return at < 0 ? tokens : tokens.slice(0, at + 1);
}

Deno.test("Engine.generate: gives the reference's tokens on 1, 2 and 5 shards, on one worker or more", async () => {
  for (const [shards, workerCount] of [[1, 1], [2, 1], [2, 2], [5, 2], [5, 5], [6, 4]] as const) {
    const t = await fakeCluster({ shards, workerCount, workers: workerCount, maxBatch: 7 });
    const { ids, text, done } = await read(
      t.engine.generate({ promptTokens: prompt, maxTokens: 40, sampling: greedy, ignoreEos: true }),
    );
    assert.deepEqual(ids, continuation(prompt, 40));
    assert.equal(text, ids.map((id) => `${id} `).join(""));
    assert.deepEqual(done, { type: "done", reason: "length", usage: { promptTokens: 3, completionTokens: 40 } });
    assert.equal(t.engine.stats().stages.length, shards);
    await t.end();
  }
});

Deno.test("Engine.start: tells how much of the model all its workers have loaded", async () => {
  const told: number[] = [];
  const kernels = { progress: [0.25, 0.75] };
  const t = await fakeCluster({
    shards: 2,
    workerCount: 2,
    workers: 2,
    kernels,
    onLoading: (share) => told.push(share),
  });
  assert.deepEqual(told.toSorted(), told);
  assert.equal(told.length, 4);
  assert.equal(told.at(-1), 0.75);
  await t.end();
});

Deno.test("Engine.generate: without maxTokens it goes to the context's end, filling KV cache and context exactly", async () => {
  for (const context of [64, 65, 96]) {
    const t = await fakeCluster({ context, kvTokens: 64 });
    assert.equal(t.engine.contextLength, Math.min(context, 64));
    const { ids, done } = await read(t.engine.generate({ promptTokens: prompt, sampling: greedy, ignoreEos: true }));
    assert.deepEqual(ids, continuation(prompt, 61));
    assert.equal(done.reason, "length");
    await t.end();
  }
});

Deno.test("Engine.generate: ends at an end-of-sequence token, which has an event without text", async () => {
  const t = await fakeCluster();
  let found = 0;
  for (let first = 1; first < 40; first++) {
    const expected = untilEos(continuation([first], 60));
    const { ids, text, done } = await read(
      t.engine.generate({ promptTokens: [first], maxTokens: 60, sampling: greedy }),
    );
    assert.deepEqual(ids, expected);
    const ended = expected.at(-1) === 0;
    if (ended) found++;
    assert.equal(done.reason, ended ? "stop" : "length");
    assert.equal(text, expected.filter((id) => id !== 0).map((id) => `${id} `).join(""));
    assert.equal(done.usage.completionTokens, expected.length);
  }
  assert(found > 5);
  await t.end();
});

Deno.test("Engine.generate: a stop string ends it across token borders and never shows", async () => {
  const t = await fakeCluster();
  const tokens = continuation(prompt, 60);
  const whole = tokens.map((id) => `${id} `).join("");
  for (let i = 5; i < 30; i++) {
    const stop = `${tokens[i]} ${tokens[i + 1]}`;
    const request = { promptTokens: prompt, maxTokens: 60, sampling: greedy, ignoreEos: true, stop: ["never", stop] };
    const { text, done, ids } = await read(t.engine.generate(request));
    assert.equal(text, whole.slice(0, whole.indexOf(stop)));
    assert.deepEqual([done.reason, done.stopSequence], ["stop", stop]);
    assert.equal(done.usage.completionTokens, ids.length);
  }
  // Text held back for a stop string that does not come is given at the end.
  const { text } = await read(
    t.engine.generate({
      promptTokens: prompt,
      maxTokens: 3,
      sampling: greedy,
      ignoreEos: true,
      stop: [tokens.slice(0, 3).map((id) => `${id} `).join("") + "never"],
    }),
  );
  assert.equal(text, tokens.slice(0, 3).map((id) => `${id} `).join(""));
  await t.end();
});

Deno.test("Engine.generate: the seed alone decides, and a request without one differs from time to time", async () => {
  const t = await fakeCluster();
  const run = async (seed?: bigint) => {
    const sampling = seed === undefined ? {} : { seed };
    return (await read(t.engine.generate({ promptTokens: prompt, maxTokens: 12, sampling, ignoreEos: true }))).ids;
  };
  assert.deepEqual(await run(5n), continuation(prompt, 12, 5n));
  assert.deepEqual(await run(5n), await run(5n));
  assert.notDeepEqual(await run(5n), await run(6n));
  assert.notDeepEqual(await run(), await run());
  await t.end();
});

Deno.test("Engine.generate: log-probabilities when asked for", async () => {
  const t = await fakeCluster();
  for (const topLogprobs of [undefined, 0, 3]) {
    const request = { promptTokens: prompt, maxTokens: 2, sampling: greedy, ignoreEos: true, topLogprobs };
    for await (const event of t.engine.generate(request)) {
      if (event.type !== "token") continue;
      assert.equal(event.logprob, topLogprobs === undefined ? undefined : -0.5);
      assert.equal(event.top?.length, topLogprobs);
    }
  }
  await t.end();
});

Deno.test("Engine.generate: malformed requests are refused with the field", async () => {
  const t = await fakeCluster({ context: 50 });
  const refused = (request: object, message: RegExp, type: new (...args: never[]) => Error = RequestError) =>
    assert.throws(() => t.engine.generate({ promptTokens: prompt, ...request }), (error: Error) => {
      assert(error instanceof type, `${error}`);
      assert.match(error.message, message);
      return true;
    });
  refused({ promptTokens: [] }, /no tokens/);
  refused({ promptTokens: [1, VOCAB] }, /prompt token 1 is 97; the vocabulary has ids 0 to 96/);
  refused({ promptTokens: [1.5] }, /prompt token 0 is 1.5/);
  refused(
    { promptTokens: new Array(50).fill(1) },
    /the prompt has 50 tokens; the context holds 50/,
    ContextLengthError,
  );
  refused({ maxTokens: 0 }, /maxTokens is 0/);
  refused({ maxTokens: NaN }, /maxTokens is NaN/);
  refused({ topLogprobs: 21 }, /topLogprobs is 21/);
  refused({ stop: [""] }, /stop string/);
  refused({ stop: new Array(65).fill("a") }, /stop has 65/);
  refused({ sampling: { temperature: -1 } }, /temperature is -1/);
  refused({ sampling: { temperature: NaN } }, /temperature is NaN/);
  refused({ sampling: { topP: 2 } }, /topP is 2/);
  refused({ sampling: { topK: 1.5 } }, /topK is 1.5/);
  refused({ sampling: { repeatPenalty: 0 } }, /repeatPenalty is 0/);
  refused({ sampling: { logitBias: new Map([[97, 1]]) } }, /token id in logitBias is 97/);
  refused({ sampling: { logitBias: new Map([[1, NaN]]) } }, /logitBias of token 1 is NaN/);
  const { ids } = await read(
    t.engine.generate({ promptTokens: new Array(49).fill(1), sampling: greedy, maxTokens: 99, ignoreEos: true }),
  );
  assert.equal(ids.length, 1, "a prompt of the context less one has room for one token");
  await t.end();
});

Deno.test("Engine.generate: leaving the loop or aborting frees the sequence on all workers at once", async () => {
  const t = await fakeCluster({ shards: 2, workerCount: 2, workers: 2 });
  const request = { promptTokens: prompt, sampling: greedy, ignoreEos: true };
  let count = 0;
  for await (const _ of t.engine.generate(request)) if (++count === 3) break;
  assert.equal(t.engine.stats().running, 0);
  await settled(() => t.sequences() === 0);

  const controller = new AbortController();
  const aborted = t.engine.generate(request, { signal: controller.signal });
  await aborted.next();
  const waiting = (async () => {
    for (;;) if ((await aborted.next()).done) return;
  })();
  controller.abort(new Error("left"));
  await assert.rejects(waiting, /left/);
  assert.deepEqual(await aborted.next(), { done: true, value: undefined });
  assert.equal(t.engine.stats().running, 0);
  assert.throws(() => t.engine.generate(request, { signal: controller.signal }), /left/);

  const unread = t.engine.generate(request);
  const next = unread.next();
  await unread.return!();
  assert.equal((await next).done, true);
  await t.end();
});

Deno.test("Engine.generate: a stream that nobody reads holds up nobody", async () => {
  const t = await fakeCluster({ context: 200 });
  const unread = t.engine.generate({ promptTokens: [9], sampling: greedy, ignoreEos: true });
  const { ids } = await read(
    t.engine.generate({ promptTokens: prompt, maxTokens: 150, sampling: greedy, ignoreEos: true }),
  );
  assert.deepEqual(ids, continuation(prompt, 150));
  assert.deepEqual((await read(unread)).ids, continuation([9], 199));
  await t.end();
});

Deno.test("Engine.generate: more requests than may wait are refused, and room comes back", async () => {
  const t = await fakeCluster({ maxRunning: 2, maxQueued: 3 });
  const request = { promptTokens: prompt, maxTokens: 20, sampling: greedy, ignoreEos: true };
  const running = Array.from({ length: 5 }, () => t.engine.generate(request));
  assert.throws(() => t.engine.generate(request), { name: "QueueFullError", limit: 3 });
  assert.throws(() => t.engine.generate(request), QueueFullError);
  const answers = await Promise.all(running.map(read));
  for (const { ids } of answers) assert.deepEqual(ids, continuation(prompt, 20));
  assert.deepEqual((await read(t.engine.generate(request))).ids, continuation(prompt, 20));
  await t.end();
});

Deno.test("Engine.logits: the same in every chunking, split and company", async () => {
  const tokens = Array.from({ length: 90 }, (_, i) => (i * 31) % VOCAB);
  let expected: Float32Array | undefined;
  for (const shards of [1, 3]) {
    const t = await fakeCluster({ shards, bus: new InProcessBus({ maxPayload: 20_000 }), maxBatch: 64 });
    const company = t.engine.generate({ promptTokens: prompt, sampling: greedy, ignoreEos: true });
    for (const options of [{}, { chunk: 1 }, { chunk: 7 }, { chunk: 64 }]) {
      const logits = await t.engine.logits(tokens, options);
      assert.equal(logits.length, 90 * VOCAB);
      expected ??= logits;
      assert.deepEqual(logits, expected);
    }
    await company.return!();
    await assert.rejects(t.engine.logits([]), RequestError);
    await assert.rejects(t.engine.logits([VOCAB]), RequestError);
    await assert.rejects(t.engine.logits(new Array(5000).fill(1)), ContextLengthError);
    await assert.rejects(t.engine.logits(tokens, { chunk: 0 }), RequestError);
    await assert.rejects(t.engine.logits(tokens, { signal: AbortSignal.abort(new Error("left")) }), /left/);
    await t.end();
  }
});

Deno.test("Engine: no message exceeds the bus, with wide hidden states and many logit biases", async () => {
  const bus = new InProcessBus({ maxPayload: 40_000 });
  const t = await fakeCluster({ model: fakeModel({ embedding: 1024 }), shards: 3, bus, maxBatch: 512 });
  const long = Array.from({ length: 300 }, (_, i) => i % VOCAB);
  const logitBias = new Map(Array.from({ length: 60 }, (_, i) => [i, -1] as const));
  const answers = await Promise.all(
    Array.from({ length: 8 }, () =>
      read(
        t.engine.generate({
          promptTokens: long,
          maxTokens: 5,
          sampling: { temperature: 0, logitBias },
          ignoreEos: true,
          topLogprobs: 20,
        }),
      )),
  );
  for (const { ids } of answers) assert.deepEqual(ids, continuation(long, 5));
  await t.end();
});

Deno.test("Engine: a stage's error fails the requests of its micro-batch and no others", async () => {
  let broken = false;
  const t = await fakeCluster({
    shards: 2,
    kernels: {
      beforeLayer(layer) {
        if (broken && layer === 4) throw new Error("memory fault");
      },
    },
  });
  const request = { promptTokens: prompt, maxTokens: 5, sampling: greedy, ignoreEos: true };
  broken = true;
  await assert.rejects(read(t.engine.generate(request)), {
    name: "ClusterError",
    message: "stage 1 on worker w0 failed: memory fault",
  });
  await assert.rejects(t.engine.logits([1, 2]), ClusterError);
  broken = false;
  assert.deepEqual((await read(t.engine.generate(request))).ids, continuation(prompt, 5));
  await t.end();
});

Deno.test("Engine: what does not come in time is computed anew; what comes late or twice is ignored", async () => {
  let open = () => {};
  const gate = new Promise<void>((resolve) => open = resolve);
  let waits = true;
  const t = await fakeCluster({ stepTimeoutMs: 30, kernels: { beforeLayer: () => waits ? gate : undefined } });
  const request = { promptTokens: prompt, maxTokens: 5, sampling: greedy, ignoreEos: true };
  const answer = read(t.engine.generate(request));
  await settled(() => t.engine.clusterStatus().state === "recovering");
  waits = false;
  open();
  assert.deepEqual((await answer).ids, continuation(prompt, 5));
  assert.equal(t.engine.clusterStatus().recoveries, 1);
  await t.end();
});

Deno.test("Engine: every message may come twice", async () => {
  class TwiceBus extends InProcessBus {
    override publish(subject: string, data: Uint8Array, options?: PublishOptions): void {
      super.publish(subject, data, options);
      super.publish(subject, data, options);
    }
  }
  const t = await fakeCluster({
    bus: new TwiceBus(),
    shards: 5,
    workerCount: 3,
    workers: 3,
    kvTokens: 320,
    context: 160,
  });
  await Promise.all(Array.from({ length: 8 }, async (_, n) => {
    const request = { promptTokens: [n + 1, 2], maxTokens: 70, sampling: greedy, ignoreEos: true };
    assert.deepEqual((await read(t.engine.generate(request))).ids, continuation([n + 1, 2], 70));
  }));
  await t.end();
});

Deno.test("Engine: a message that is lost costs no token", async () => {
  const bus = new LossyBus();
  const t = await fakeCluster({ bus, shards: 3, workerCount: 2, workers: 2, stepTimeoutMs: 50 });
  const request = { promptTokens: prompt, maxTokens: 40, sampling: greedy, ignoreEos: true };
  for (let lost = 1; lost < 10; lost++) {
    bus.lose = 20 + lost;
    const answers = await Promise.all(Array.from({ length: 3 }, () => read(t.engine.generate(request))));
    for (const { ids } of answers) assert.deepEqual(ids, continuation(prompt, 40));
    assert.equal(t.engine.clusterStatus().recoveries, lost);
  }
  await t.end();
});

Deno.test("Engine: tokens go straight from the last stage to the first, and an answer's end in their midst is kept", async () => {
  const t = await fakeCluster({ shards: 3, workerCount: 3, workers: 3 });
  const { ids } = await read(
    t.engine.generate({ promptTokens: prompt, maxTokens: 41, sampling: greedy, ignoreEos: true }),
  );
  assert.deepEqual(ids, continuation(prompt, 41));
  assert.equal(t.engine.stats().steps, 1 + 40 / 4);
  // A token that ends it comes in the midst of four, of which the rest is computed in vain.
  const words = continuation(prompt, 60);
  const end = words.findIndex((id, i) => i >= 25 && i % 4 === 2 && words.indexOf(id) === i);
  assert(end > 0);
  const request = { promptTokens: prompt, maxTokens: 60, sampling: greedy, ignoreEos: true };
  const stopped = await read(t.engine.generate({ ...request, stop: [` ${words[end]} `] }));
  assert.deepEqual(stopped.ids, words.slice(0, end + 1));
  await settled(() => t.engine.stats().inFlight === 0);
  const turn = [...prompt, ...words.slice(0, end), 9];
  const before = t.engine.stats().reusedTokens;
  const answer = await read(t.engine.generate({ ...request, promptTokens: turn }));
  assert.deepEqual(answer.ids, continuation(turn, 60));
  assert.equal(t.engine.stats().reusedTokens - before, prompt.length + end);
  await t.end();
});

Deno.test("Engine: forged results of other epochs and steps do nothing", async () => {
  const t = await fakeCluster();
  const subjects: string[] = [];
  const spy = t.bus.subscribe("lutra.local.orchestrator.*.results", (message) => subjects.push(message.subject));
  const events = t.engine.generate({ promptTokens: prompt, maxTokens: 50, sampling: greedy, ignoreEos: true });
  await events.next();
  const none = new Uint8Array();
  for (const [epoch, step] of [[2, 0], [1, 0], [1, 10_000], [0, 1]] as const) {
    t.bus.publish(subjects[0]!, encodeMessage({ kind: "result", epoch, step, error: true }, none, none));
    t.bus.publish(subjects[0]!, Uint8Array.of(1, 2, 3));
  }
  const { ids } = await read(events);
  assert.deepEqual(ids, continuation(prompt, 50).slice(1));
  spy.unsubscribe();
  await t.end();
});

Deno.test("Engine: a worker that leaves costs no token; the last one's leave is told, and a newcomer brings the cluster back", async () => {
  const t = await fakeCluster({ shards: 2, workerCount: 2, workers: 2, recoveryTimeoutMs: 20 });
  const request = { promptTokens: prompt, maxTokens: 60, sampling: greedy, ignoreEos: true };
  const answers = [1, 2, 3].map(() => read(t.engine.generate(request)));
  const events = t.engine.generate(request);
  await events.next();
  await t.workers[1]!.close();
  for (const { ids } of await Promise.all(answers)) assert.deepEqual(ids, continuation(prompt, 60));
  assert.deepEqual((await read(events)).ids, continuation(prompt, 60).slice(1));
  assert.deepEqual(t.engine.stats().stages.map((stage) => stage.worker), ["w0", "w0"]);

  const last = t.engine.generate({ ...request, maxTokens: 4000 });
  await last.next();
  const logits = t.engine.logits([1]);
  const refused = assert.rejects(logits, ClusterError);
  await t.workers[0]!.close();
  await assert.rejects(read(last), { name: "PlacementError", message: "there are no workers" });
  await refused.catch(() => {}); // done before, perhaps
  assert.throws(() => t.engine.generate(request), { name: "ClusterError", message: "there are no workers" });
  const { FakeKernels } = await import("../tests/fakes/kernels.ts");
  const { Worker } = await import("../worker/worker.ts");
  const late = await Worker.start({
    bus: t.bus,
    kernels: new FakeKernels(),
    id: "late",
    memoryBytes: 1e9,
    log: () => {},
  });
  await settled(() => t.engine.failure === undefined);
  assert.deepEqual((await read(t.engine.generate(request))).ids, continuation(prompt, 60));
  await t.engine.close();
  await late.close();
  assert.equal(t.bus.subscriptions, 0);
  await t.bus.close();
});

Deno.test("Engine: a worker that drains computes until others have its layers, and loses no token", async () => {
  const t = await fakeCluster({ shards: 2, workerCount: 3, workers: 3 });
  const request = { promptTokens: prompt, maxTokens: 200, sampling: greedy, ignoreEos: true };
  const answers = [1, 2, 3].map(() => read(t.engine.generate(request)));
  const leaving = t.engine.stats().stages[0]!.worker;
  assert.equal(await t.workers.find((worker) => worker.id === leaving)!.drain(5000), true);
  for (const { ids } of await Promise.all(answers)) assert.deepEqual(ids, continuation(prompt, 200));
  assert(t.engine.stats().stages.every((stage) => stage.worker !== leaving));
  await t.end();
});

Deno.test("Engine.close: ends running and waiting requests, and refuses new ones", async () => {
  const t = await fakeCluster({ maxRunning: 1 });
  const request = { promptTokens: prompt, sampling: greedy, ignoreEos: true };
  const [running, waiting] = [t.engine.generate(request), t.engine.generate(request)];
  const logits = t.engine.logits([1, 2]);
  await running.next();
  const closed = t.engine.close();
  await assert.rejects(logits, EngineClosedError);
  await assert.rejects(read(running), EngineClosedError);
  await assert.rejects(read(waiting), EngineClosedError);
  assert.throws(() => t.engine.generate(request), EngineClosedError);
  await closed;
  await t.end();
});

Deno.test("Engine.start: says what is missing", async () => {
  await assert.rejects(fakeCluster({ workers: 2, workerTimeoutMs: 5 }), /1 of 2 workers are there/);
  await assert.rejects(fakeCluster({ shards: 7 }), /7 shards are asked for; a model of 6 layers can have 1 to 6/);
  await assert.rejects(fakeCluster({ context: 1 << 20 }), /context is 1048576; it must be an integer, 2 to 4096/);
  await assert.rejects(fakeCluster({ bus: new InProcessBus({ maxPayload: 1000 }) }), /the bus takes 1000 bytes/);
  const model = fakeModel();
  await assert.rejects(
    fakeCluster({ model: { ...model, path: "missing.gguf" } }),
    /worker w0 did not load: missing.gguf: no such file/,
  );
  await assert.rejects(fakeCluster({ signal: AbortSignal.abort(new Error("enough")) }), /enough/);
});

Deno.test("Engine.start: a second engine is refused; after the first it takes a newer epoch over the same shards", async () => {
  const t = await fakeCluster({ unload: false });
  await assert.rejects(Engine.start({ bus: t.bus, model: fakeModel() }), {
    name: "ClusterError",
    message: /cluster local is served already/,
  });
  await t.engine.close();
  const opened = t.kernels.shards.length;
  const second = await Engine.start({ bus: t.bus, model: fakeModel() });
  assert.equal(second.stats().epoch, 2);
  assert.equal(t.kernels.shards.length, opened, "a shard was opened again");
  const request = { promptTokens: prompt, maxTokens: 5, sampling: greedy, ignoreEos: true };
  assert.deepEqual((await read(second.generate(request))).ids, continuation(prompt, 5));
  await second.close();
  await t.end();
});
