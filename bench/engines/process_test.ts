import assert from "node:assert/strict";
import { repoPath } from "../../tests/data.ts";
import { checkAgreement, comparePhase, DisagreementError, ROOM } from "../compare.ts";
import { peerRowSchema } from "../rows.ts";
import { EngineError, EngineProcess } from "./process.ts";

const fake = (mode: string) =>
  EngineProcess.start({
    name: mode,
    command: Deno.execPath(),
    args: ["run", "-q", repoPath("tests", "fakes", "engine.ts"), mode],
    cores: 1,
  });
const model = { path: "model.gguf", threads: 1, ...ROOM };
const step = { batch: 1, tokens: 1, context: 0, warmUp: 1, steps: 3 };

Deno.test("EngineProcess: answers requests one after the other, and ends when it is disposed of", async () => {
  await using engine = fake("steady");
  assert.deepEqual(await engine.load(model), { name: "fake", build: "steady", bytesPerStep: 1e6 });
  assert.equal(await engine.bandwidth(1), 10);
  assert.deepEqual(await engine.measure(step), [0.002, 0.002, 0.002]);
  assert.equal((await engine.logits([1, 2])).length, 16);
});

Deno.test("EngineProcess: a request of the wrong form is refused by the engine, which goes on", async () => {
  await using engine = fake("steady");
  await assert.rejects(engine.measure({ ...step, steps: 0 }), EngineError);
  assert.equal((await engine.measure(step)).length, 3);
});

for (
  const [mode, message] of [["refuse", /refuse: no room/], ["babble", /no JSON: hello/], [
    "crash",
    /ended at a measure with code 3/,
  ]] as const
) {
  Deno.test(`EngineProcess: an engine that does "${mode}" is named in an EngineError`, async () => {
    await using engine = fake(mode);
    await engine.load(model);
    await assert.rejects(engine.measure(step), (error) => error instanceof EngineError && message.test(error.message));
  });
}

Deno.test("EngineProcess: a command that is not there is an EngineError", () => {
  const start = () => EngineProcess.start({ name: "none", command: "lutra-no-such-command", args: [] });
  assert.throws(start, EngineError);
});

Deno.test("comparePhase: two engines of the same speed have ratio 1, and the row keeps to its schema", async () => {
  await using lutra = fake("steady");
  await using peer = fake("steady");
  const info = await lutra.load(model);
  await peer.load(model);
  await checkAgreement(lutra, peer);
  const options = { type: "Q4_0", threads: 1, rounds: 3, seconds: 0.02, info };
  const decode = await comparePhase(lutra, peer, { ...options, phase: "decode" });
  assert.deepEqual(peerRowSchema.parse(decode), {
    type: "Q4_0",
    phase: "decode",
    threads: 1,
    batch: 1,
    lutra: 500,
    peer: 500,
    ratio: 1,
    gbps: 0.5,
    bandwidth: 10,
    share: 0.05,
  });
  const prefill = peerRowSchema.parse(await comparePhase(lutra, peer, { ...options, phase: "prefill" }));
  assert.deepEqual([prefill.batch, prefill.lutra, prefill.share], [256, 128000, null]);
});

Deno.test("checkAgreement: engines that compute different things are not compared", async () => {
  await using lutra = fake("steady");
  await using peer = fake("contrary");
  await assert.rejects(checkAgreement(lutra, peer), DisagreementError);
});
