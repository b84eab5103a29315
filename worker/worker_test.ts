import assert from "node:assert/strict";
import {
  clusterSubjects,
  controlReplySchema,
  decodeFailure,
  decodeJson,
  decodeMessage,
  decodeProbeReply,
  decodeResults,
  encodeBatch,
  encodeJson,
  encodeMessage,
  helloSchema,
  InProcessBus,
  shardTensors,
} from "../bus/mod.ts";
import type {
  BatchEntry,
  ControlReply,
  ControlRequest,
  Hello,
  SampleParameters,
  Shard,
  WireMessage,
} from "../bus/mod.ts";
import { fakeContinuation, FakeKernels, fakeShard } from "../tests/fakes/kernels.ts";
import type { FakeKernelsOptions } from "../tests/fakes/kernels.ts";
import { Worker } from "./worker.ts";

const greedy: SampleParameters = {
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  repeatPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  penaltyLastN: 0,
  promptLength: 3,
  seed: 0n,
  logitBias: new Map(),
};
const VOCAB = 97;
const short = { ...greedy, promptLength: 1 };
const NONE = new Uint8Array();

/** A worker on a fresh bus, with the means to talk to it. */
async function start(options: FakeKernelsOptions & { workers?: string[] } = {}) {
  const bus = new InProcessBus();
  const subjects = clusterSubjects("local");
  const hellos: Hello[] = [];
  bus.subscribe(subjects.hello, (message) => hellos.push(decodeJson(helloSchema, message.data)));
  const results: WireMessage[] = [];
  let wake = () => {};
  bus.subscribe("results", (message) => {
    results.push(decodeMessage(message.data));
    wake();
  });
  const kernels = new FakeKernels(options);
  const log: string[] = [];
  const workers: Worker[] = [];
  for (const id of options.workers ?? ["a"]) {
    workers.push(await Worker.start({ bus, kernels, id, memoryBytes: 1e9, log: (line) => log.push(line) }));
  }
  const control = async (request: ControlRequest, id = "a"): Promise<ControlReply> =>
    decodeJson(controlReplySchema, (await bus.request(subjects.control(id), encodeJson(request))).data);
  const load = async (shard: Shard = fakeShard(), epoch = 1) => {
    const reply = await control({
      type: "load",
      epoch,
      stages: [{ stage: 0, shard, next: "results" }],
      results: "results",
    });
    assert(reply.ok, JSON.stringify(reply));
    return reply;
  };
  return {
    bus,
    subjects,
    hellos,
    results,
    kernels,
    log,
    workers,
    control,
    load,
    send: (step: number, entries: BatchEntry[], { epoch = 1, payload = NONE, stage = 0, id = "a" } = {}) =>
      bus.publish(
        subjects.stage(id, stage),
        encodeMessage({ kind: "work", epoch, step }, encodeBatch(entries), payload),
      ),
    /** Resolves when so many results came. */
    async arrived(count: number): Promise<void> {
      while (results.length < count) await new Promise<void>((resolve) => wake = resolve);
    },
    async end(): Promise<void> {
      for (const worker of workers) await worker.close();
      await bus.close();
      for (const shard of kernels.shards) {
        assert.deepEqual(shard.misuse, []);
        assert(shard.closed);
      }
    },
  };
}

function tokensOf(results: readonly WireMessage[]): (number | undefined)[] {
  return results.flatMap((message) => decodeResults(message, VOCAB).map((result) => result.sampled?.id));
}

/** A gate that a fake layer waits at. */
function gate() {
  let open = () => {};
  let entered = () => {};
  const isOpen = new Promise<void>((resolve) => open = resolve);
  const isEntered = new Promise<void>((resolve) => entered = resolve);
  return { open, entered: isEntered, pass: () => (entered(), isOpen) };
}

Deno.test("Worker: announces itself at start, on discovery, and when it leaves", async () => {
  const t = await start();
  t.bus.publish(t.subjects.discover, NONE);
  await t.bus.flush();
  await t.bus.flush();
  assert.deepEqual(t.hellos.map((hello) => [hello.id, hello.state]), [["a", "ready"], ["a", "ready"]]);
  assert.deepEqual(t.hellos[0]!.capabilities, {
    isa: "fake",
    cores: 1,
    memoryBytes: 1e9,
    bandwidthGBps: null,
    speed: null,
  });
  await t.workers[0]!.close();
  await t.bus.flush();
  assert.equal(t.hellos.at(-1)!.state, "leaving");
  assert.equal(t.bus.subscriptions, 2); // those of this test
  await t.end();
});

Deno.test("Worker: tells how far loading is, and what its cache lacks", async () => {
  const t = await start({ progress: [0, 0.5, 1], note: "the disk is full" });
  await t.load();
  assert.deepEqual(t.hellos.map((hello) => hello.loading?.share), [undefined, 0, 0.5, 1]);
  assert(t.hellos.slice(1).every(({ loading }) => loading!.phase === "packing"));
  assert.deepEqual(t.log, ["worker a: the disk is full"]);
  await t.end();
});

Deno.test("Worker: heartbeats tell how long its stages take; a probe is answered while one computes", async () => {
  const wait = gate();
  let waits = false;
  const t = await start({ beforeLayer: () => waits ? wait.pass() : undefined });
  const stages = async () => {
    const before = t.hellos.length;
    t.bus.publish(t.subjects.discover, NONE);
    while (t.hellos.length === before) await t.bus.flush();
    return t.hellos.at(-1)!.work.stages;
  };
  assert.deepEqual(await stages(), []);
  await t.load();
  assert.deepEqual(await stages(), [{ stage: 0, stepMs: null, busyMs: 0 }]);
  t.send(0, [{ seq: 1, pos: 0, tokens: [5, 6, 7], sample: greedy }]);
  await t.arrived(1);
  const [one] = await stages();
  assert.equal(one!.stepMs, one!.busyMs, "one micro-batch is its own mean");
  assert(one!.busyMs > 0);
  waits = true;
  t.send(1, [{ seq: 2, pos: 0, tokens: [5, 6, 7], sample: greedy }]);
  await wait.entered;
  await new Promise((resolve) => setTimeout(resolve, 20));
  const [running] = await stages();
  assert(running!.busyMs >= one!.busyMs + 19, "the running micro-batch counts");
  assert.equal(running!.stepMs, one!.stepMs, "but in no mean");
  const answer = await t.bus.request(t.subjects.probe("a"), Uint8Array.of(1, 2, 3));
  assert(Math.abs(decodeProbeReply(answer.data, 3) - Date.now()) < 1000);
  assert.deepEqual([...answer.data.subarray(8)], [1, 2, 3]);
  await assert.rejects(t.bus.request(t.subjects.probe("a"), new Uint8Array(t.bus.maxPayload), { timeoutMs: 20 }));
  wait.open();
  await t.arrived(2);
  await t.end();
});

Deno.test("Worker: computes prefill and decode of a whole model", async () => {
  const t = await start();
  await t.load();
  const expected = fakeContinuation({ layers: 6, vocab: VOCAB }, [5, 6, 7], 4, greedy);
  t.send(0, [{ seq: 1, pos: 0, tokens: [5, 6] }]);
  t.send(1, [{ seq: 1, pos: 2, tokens: [7], sample: greedy }]);
  t.send(2, [{ seq: 1, pos: 3, tokens: [expected[0]!], sample: greedy }]);
  t.send(3, [{ seq: 1, pos: 4, tokens: expected.slice(1, 3), sample: greedy }]);
  await t.arrived(4);
  assert.deepEqual(tokensOf(t.results), [undefined, expected[0], expected[1], expected[3]]);
  await t.end();
});

Deno.test("Worker: stages on one and on several workers give the same tokens", async () => {
  for (const split of [[0, 6], [0, 3, 6], [0, 1, 2, 3, 4, 6]]) {
    for (const ids of [["a"], ["a", "b"]]) {
      const t = await start({ workers: ids });
      const stages = split.slice(0, -1).map((first, stage) => {
        const last = stage === split.length - 2;
        const shard = fakeShard({ first, end: split[stage + 1]! });
        const owner = ids[stage % ids.length]!;
        const next = last ? "results" : t.subjects.stage(ids[(stage + 1) % ids.length]!, stage + 1);
        return { owner, stage: { stage, shard, next } };
      });
      for (const id of ids) {
        const mine = stages.filter(({ owner }) => owner === id).map(({ stage }) => stage);
        assert((await t.control({ type: "load", epoch: 1, stages: mine, results: "results" }, id)).ok);
      }
      t.send(0, [{ seq: 1, pos: 0, tokens: [5, 6] }, { seq: 2, pos: 0, tokens: [9], sample: short }]);
      t.send(1, [{ seq: 1, pos: 2, tokens: [7], sample: greedy }]);
      await t.arrived(2);
      const hyper = { layers: 6, vocab: VOCAB };
      assert.deepEqual(tokensOf(t.results), [
        undefined,
        fakeContinuation(hyper, [9], 1, greedy)[0],
        fakeContinuation(hyper, [5, 6, 7], 1, greedy)[0],
      ]);
      await t.end();
    }
  }
});

Deno.test("Worker: a message received twice, of another epoch or malformed is counted and dropped", async () => {
  const t = await start();
  await t.load();
  const entry = { seq: 1, pos: 0, tokens: [5, 6, 7], sample: greedy };
  t.send(7, [entry]);
  t.send(7, [entry]);
  t.send(8, [entry], { epoch: 2 });
  t.bus.publish(t.subjects.stage("a", 0), Uint8Array.of(1, 2, 3));
  t.bus.publish(t.subjects.stage("a", 0), encodeMessage({ kind: "work", epoch: 1, step: 9 }, NONE, NONE));
  t.bus.publish(t.subjects.control("a"), new TextEncoder().encode('{"type":"explode"}'));
  t.send(10, [{ seq: 1, pos: 3, tokens: [1] }]);
  await t.arrived(2);
  assert.deepEqual(t.results.map((result) => [result.step, result.error]), [[7, false], [10, false]]);
  const status = await t.control({ type: "status" });
  assert(status.ok);
  assert.deepEqual(status.dropped, { malformed: 3, epoch: 1, duplicate: 1 });
  assert.equal(status.stages[0]!.steps, 2);
  assert.equal(t.log.length, 4, "of each kind the first, second, fourth… are logged");
  await t.end();
});

Deno.test("Worker: 5000 random control and work messages do not end it", async () => {
  const t = await start();
  await t.load();
  const good = encodeMessage({ kind: "work", epoch: 1, step: 1 }, encodeBatch([{ seq: 1, pos: 0, tokens: [1] }]), NONE);
  let x = 7;
  const random = (n: number) => (x = (Math.imul(x, 1664525) + 1013904223) >>> 0) % n;
  for (let i = 0; i < 5000; i++) {
    const bytes = i % 2 ? good.slice() : Uint8Array.from({ length: random(60) }, () => random(256));
    if (bytes.length > 0) bytes[random(bytes.length)] = random(256);
    t.bus.publish(i % 3 ? t.subjects.stage("a", 0) : t.subjects.control("a"), bytes);
    if (i % 500 === 0) await t.bus.flush();
  }
  t.send(1 << 30, [{ seq: 99, pos: 0, tokens: [5, 6, 7], sample: greedy }]);
  while (!t.results.some((result) => result.step === 1 << 30)) await t.arrived(t.results.length + 1);
  assert.equal(t.results.find((result) => result.step === 1 << 30)!.error, false);
  await t.end();
});

Deno.test("Worker: what goes wrong in a micro-batch is reported with stage, worker and code, and the next one runs", async () => {
  const t = await start();
  await t.load();
  t.send(0, [{ seq: 1, pos: 5, tokens: [1] }]);
  t.send(1, [{ seq: 1, pos: 0, tokens: [1] }], { payload: new Uint8Array(4) });
  t.send(2, [{ seq: 2, pos: 0, tokens: new Array(65).fill(1) }]);
  t.send(3, [{ seq: 1, pos: 0, tokens: [5, 6, 7], sample: greedy }]);
  await t.arrived(4);
  assert.deepEqual(t.results.map((result) => result.error), [true, true, true, false]);
  const failures = t.results.slice(0, 3).map((result) => decodeFailure(result.payload));
  assert.deepEqual(failures.map(({ code, worker, stage }) => [code, worker, stage]), [[-7, "a", 0], [0, "a", 0], [
    -1,
    "a",
    0,
  ]]);
  assert.match(failures[0]!.message, /sequence 1 has 0 tokens/);
  assert.match(failures[1]!.message, /4 bytes of hidden states/);
  await t.end();
});

Deno.test("Worker: a result too large for the bus is an error, not a crash", async () => {
  const t = await start();
  await t.load(fakeShard({ maxBatch: 4096, vocab: 5000 }));
  t.send(0, [{ seq: 1, pos: 0, tokens: new Array(64).fill(1), logits: true }]);
  await t.arrived(1);
  assert.match(decodeFailure(t.results[0]!.payload).message, /gives \d+ bytes; the bus takes 1048576/);
  await t.end();
});

Deno.test("Worker: release overtakes queued work, and an emptied micro-batch still travels", async () => {
  const wait = gate();
  let waits = false;
  const t = await start({ beforeLayer: (layer) => waits && layer === 0 ? wait.pass() : undefined });
  await t.load();
  t.send(9, [{ seq: 7, pos: 0, tokens: [1] }]);
  await t.arrived(1);
  waits = true;
  t.send(0, [{ seq: 1, pos: 0, tokens: [1] }, { seq: 2, pos: 0, tokens: [1, 2] }]);
  t.send(1, [{ seq: 3, pos: 0, tokens: [5, 6, 7], sample: greedy }]);
  t.send(2, [{ seq: 2, pos: 2, tokens: [3] }, { seq: 4, pos: 0, tokens: [5, 6, 7], sample: greedy }]);
  await wait.entered;
  t.bus.publish(t.subjects.control("a"), encodeJson({ type: "release", epoch: 1, seqs: [2, 3, 7] }));
  await t.bus.flush();
  wait.open();
  await t.arrived(4);
  const shard = t.kernels.shards[0]!;
  assert.deepEqual(shard.forwards.map((forward) => forward.seqs), [[7], [1, 2], [4]]);
  assert.deepEqual([...shard.sequences.keys()], [1, 4]);
  assert.deepEqual(decodeResults(t.results[2]!, VOCAB), []);
  t.send(3, [{ seq: 2, pos: 0, tokens: [3] }]); // late: stays dead
  await t.arrived(5);
  assert.deepEqual([...shard.sequences.keys()], [1, 4]);
  await t.end();
});

Deno.test("Worker: release of all its sequences stops the running micro-batch", async () => {
  const wait = gate();
  let layers = 0;
  const t = await start({ beforeLayer: (layer) => (layers++, layer === 1 ? wait.pass() : undefined) });
  await t.load();
  t.send(0, [{ seq: 1, pos: 0, tokens: [1] }, { seq: 2, pos: 0, tokens: [1, 2] }]);
  await wait.entered;
  t.bus.publish(t.subjects.control("a"), encodeJson({ type: "release", epoch: 1, seqs: [1] }));
  t.bus.publish(t.subjects.control("a"), encodeJson({ type: "release", epoch: 1, seqs: [2] }));
  await t.bus.flush();
  wait.open();
  await t.arrived(1);
  assert.equal(layers, 2, "the layers after the stop are not computed");
  assert.equal(t.results[0]!.error, false);
  assert.deepEqual(decodeResults(t.results[0]!, VOCAB), []);
  assert.equal(t.kernels.shards[0]!.sequences.size, 0);
  await t.end();
});

Deno.test("Worker: the last stage sends what it samples straight to the first, as often as it is told", async () => {
  const t = await start();
  const [one, two] = [fakeShard({ end: 3 }), fakeShard({ first: 3 })];
  const first = t.subjects.stage("a", 0);
  const reply = await t.control({
    type: "load",
    epoch: 1,
    stages: [
      { stage: 0, shard: one, next: t.subjects.stage("a", 1) },
      { stage: 1, shard: two, next: "results", first },
    ],
    results: "results",
  });
  assert(reply.ok);
  const sample = { ...greedy, promptLength: 3 };
  const prompts = [[5, 6, 7], [8, 9, 10]];
  const entries = prompts.map((tokens, seq) => ({ seq, pos: 0, tokens, sample }));
  t.bus.publish(first, encodeMessage({ kind: "work", epoch: 1, step: 4, chain: 3 }, encodeBatch(entries), NONE));
  await t.arrived(4);
  await t.bus.flush();
  assert.deepEqual(t.results.map(({ step }) => step), [4, 5, 6, 7]);
  const answers = prompts.map((prompt) => fakeContinuation({ layers: 6, vocab: VOCAB }, prompt, 4, sample));
  assert.deepEqual(tokensOf(t.results), [0, 1, 2, 3].flatMap((i) => answers.map((answer) => answer[i])));
  // What is released has no more, but the steps that are awaited come.
  const next = entries.map(({ seq, sample }) => ({ seq, pos: 6, tokens: [answers[seq]![3]!], sample }));
  const { promise: released, resolve } = Promise.withResolvers<void>();
  const spy = t.bus.subscribe("results", () => {
    spy.unsubscribe();
    t.bus.publish(t.subjects.control("a"), encodeJson({ type: "release", epoch: 1, seqs: [0, 1] }));
    resolve();
  });
  t.bus.publish(first, encodeMessage({ kind: "work", epoch: 1, step: 8, chain: 9 }, encodeBatch(next), NONE));
  await released;
  await t.arrived(14);
  assert.deepEqual(t.results.slice(4).map(({ step }) => step), [8, 9, 10, 11, 12, 13, 14, 15, 16, 17]);
  assert.equal(tokensOf(t.results.slice(8)).length, 0);
  assert.equal(t.kernels.shards[0]!.sequences.size, 0);
  await t.end();
});

Deno.test("Worker: a new epoch keeps an equal shard without its sequences and closes the others", async () => {
  const t = await start();
  const [one, two, other] = [fakeShard({ end: 3 }), fakeShard({ first: 3 }), fakeShard({ end: 2 })];
  const load = (epoch: number, shards: Shard[]) =>
    t.control({
      type: "load",
      epoch,
      stages: shards.map((shard, stage) => ({ stage, shard, next: t.subjects.stage("a", stage + 1) })),
      results: "results",
    });
  assert((await load(1, [one, two])).ok);
  t.send(0, [{ seq: 1, pos: 0, tokens: [1] }]);
  await t.bus.flush();
  assert((await load(2, [other, two])).ok);
  assert.deepEqual(t.kernels.shards.map((shard) => shard.closed), [true, false, false]);
  assert.equal(t.kernels.shards[1]!.sequences.size, 0);
  assert((await load(2, [other, two])).ok, "received twice");
  assert.equal(t.kernels.shards.length, 3);
  const rival = await load(2, [one]);
  assert(!rival.ok && /epoch 2 has other stages already/.test(rival.error));
  const stale = await load(1, [one]);
  assert(!stale.ok && /epoch 1 is over/.test(stale.error));
  assert(!(await t.control({ type: "unload", epoch: 1 })).ok);
  assert((await t.control({ type: "unload", epoch: 2 })).ok);
  assert(t.kernels.shards.every((shard) => shard.closed));
  await t.end();
});

Deno.test("Worker: a load that fails says why and leaves nothing open", async () => {
  const t = await start();
  const request: ControlRequest = {
    type: "load",
    epoch: 1,
    stages: [
      { stage: 0, shard: fakeShard({ end: 3 }), next: t.subjects.stage("a", 1) },
      { stage: 1, shard: fakeShard({ first: 3, path: "missing.gguf" }), next: "results" },
    ],
    results: "results",
  };
  const reply = await t.control(request);
  assert(!reply.ok);
  assert.deepEqual([reply.code, reply.error], [-5, "missing.gguf: no such file"]);
  assert(t.kernels.shards.every((shard) => shard.closed));
  await t.end();
});

Deno.test("Worker: close during a micro-batch gives it up", async () => {
  const wait = gate();
  const t = await start({ beforeLayer: (layer) => layer === 0 ? wait.pass() : undefined });
  await t.load();
  t.send(0, [{ seq: 1, pos: 0, tokens: [1] }]);
  t.send(1, [{ seq: 2, pos: 0, tokens: [1] }]);
  await wait.entered;
  const closed = t.workers[0]!.close();
  wait.open();
  await closed;
  assert.deepEqual(t.kernels.shards[0]!.forwards, []);
  await t.bus.flush();
  assert.equal(t.results.length, 0);
  await t.end();
});

Deno.test("Worker: measures its speed when it is asked, once for a probe, and announces it", async () => {
  const bus = new InProcessBus();
  const subjects = clusterSubjects("local");
  const hellos: Hello[] = [];
  bus.subscribe(subjects.hello, (message) => hellos.push(decodeJson(helloSchema, message.data)));
  const kernels = new FakeKernels({ beforeLayer: () => new Promise((resolve) => setTimeout(resolve, 4)) });
  const worker = await Worker.start({ bus, kernels, id: "a", memoryBytes: 1e9, measure: true });
  const mute = await Worker.start({ bus, kernels, id: "mute", memoryBytes: 1e9 });
  const ask = async (id: string, probe: string, shard: Shard) => {
    const request: ControlRequest = { type: "measure", probe, shard };
    return decodeJson(controlReplySchema, (await bus.request(subjects.control(id), encodeJson(request))).data);
  };
  const shard = fakeShard({ first: 1 });
  const [one, two] = ["1", "2"].map((digit) => digit.repeat(64));
  assert((await ask("a", one!, shard)).ok);
  const { speed } = hellos.at(-1)!.capabilities;
  assert.equal(speed?.probe, one);
  assert(speed!.msPerLayer >= 4, `${speed!.msPerLayer} ms`);
  const [probed] = kernels.shards;
  assert(probed!.forwards.every(({ tokens }) => tokens === 1));
  assert(
    probed!.forwards.some(({ sampled }) => sampled === 1) && probed!.forwards.some(({ sampled }) => sampled === 0),
  );
  assert.deepEqual([probed!.misuse, probed!.closed, probed!.sequences.size], [[], true, 0]);
  assert((await ask("a", one!, shard)).ok);
  assert((await ask("mute", one!, shard)).ok);
  assert.equal(kernels.shards.length, 1, "known already, and not to be measured");
  // What is too large to try is refused, and what was known stays.
  const huge = structuredClone(shard);
  shardTensors(huge)[0]!.bytes = 6e8;
  const refused = await ask("a", two!, huge);
  assert(!refused.ok && /too much to be measured/.test(refused.error), JSON.stringify(refused));
  assert.equal(hellos.at(-1)!.capabilities.speed?.probe, one);
  for (const each of [worker, mute]) await each.close();
  await bus.close();
});

Deno.test("Worker: a load ends the wait for another's weights, and what it held before stays", async () => {
  const bus = new InProcessBus();
  const kernels = new FakeKernels();
  const cache = Deno.makeTempDirSync();
  const worker = await Worker.start({
    ...{ bus, kernels, id: "a", memoryBytes: 1e9, weights: { cache, maxBytes: 1e9 }, log: () => {} },
  });
  const control = async (request: ControlRequest): Promise<ControlReply> =>
    decodeJson(
      controlReplySchema,
      (await bus.request(clusterSubjects("local").control("a"), encodeJson(request))).data,
    );
  const load = (epoch: number, shard: Shard, root?: string) => {
    const weights = root === undefined ? {} : { weights: { root, files: [1000] } };
    return control({ type: "load", epoch, stages: [{ stage: 0, shard, ...weights, next: "r" }], results: "r" });
  };
  const nobodys = "0".repeat(64);
  assert((await load(1, fakeShard())).ok);
  const [held] = kernels.shards;
  const stuck = load(2, fakeShard({ first: 1 }), nobodys);
  const ahead = control({
    type: "fetch",
    stages: [{ stage: 0, shard: fakeShard({ first: 2 }), weights: { root: nobodys, files: [1000] }, next: "" }],
  });
  assert((await load(3, fakeShard())).ok);
  assert.match(JSON.stringify(await stuck), /"ok":false.*(epoch 3 begins|other weights are wanted)/);
  assert.match(JSON.stringify(await ahead), /"ok":false.*epoch 3 begins/);
  assert.equal(kernels.shards.length, 1, "the shard was kept");
  assert(!held!.closed);
  // It leaves while it waits.
  const last = load(4, fakeShard({ first: 1 }), nobodys);
  await bus.flush();
  await worker.close();
  assert.match(JSON.stringify(await last), /"ok":false.*leaves/);
  await bus.close();
  Deno.removeSync(cache, { recursive: true });
});
