import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { clusterStatusSchema, decodeJson } from "../../bus/mod.ts";
import { startLocalCluster } from "../../cli/local_cluster.ts";
import { loadKernels } from "../../worker/mod.ts";
import { repoPath } from "../data.ts";
import { nats } from "../nats.ts";
import { FaultCluster, limitsCores, MODEL } from "./harness.ts";
import { FAULTS, gathered, requests, runFaults, tokens } from "./matrix.ts";

// Never closed, hence opened before any test: it is no test's leak.
loadKernels();

Deno.test({
  name: "faults: whatever breaks in the midst of answers, no token is lost, repeated or changed",
  ignore: nats.absent,
  async fn() {
    let rows = 0;
    for await (const { fault, lost, repeated, changed, recover_ms } of runFaults(1)) {
      assert.deepEqual({ lost, repeated, changed }, { lost: 0, repeated: 0, changed: 0 }, fault);
      const harmless = FAULTS[fault]!.harmless === true;
      assert.equal(recover_ms === null, harmless, `${fault}: ${harmless ? "a false alarm" : "nothing was noticed"}`);
      rows++;
    }
    assert(rows >= 10, `${rows} faults`);
  },
});

Deno.test({
  name: "replicas: a worker that comes while streams run serves beside the first, to the same tokens",
  ignore: nats.absent,
  async fn() {
    const wanted = requests(12);
    let expected: number[][];
    {
      await using one = await startLocalCluster(MODEL, { threads: 1, context: 512, kvTokens: 4096 });
      expected = await Promise.all(wanted.map((request) => tokens(one.engine, request)));
    }
    await using cluster = await FaultCluster.start(2, { workers: 1 });
    const [first] = cluster.engine.stats().stages;
    const late = cluster.devices.find(({ id }) => id !== first!.worker)!;
    late.kill("SIGKILL");
    await late.ended();
    await gathered(cluster, 1);
    cluster.events.length = 0; // it may have served already
    late.start();
    const { engine } = cluster;
    const steps = async () => (await engine.query()).map(({ steps }) => steps);
    for (let rounds = 0; (await steps()).filter((count) => count > 100).length < 2; rounds++) {
      assert(rounds < 500, `it does not serve: ${await steps()}`);
      assert.deepEqual(await Promise.all(wanted.map((request) => tokens(engine, request))), expected);
    }
    assert.equal(
      cluster.events.filter(({ text }) => text.endsWith(": placing anew")).length,
      0,
      "streams were disturbed",
    );
  },
});

Deno.test({
  name: "placement: of two devices of equal bandwidth the one with a quarter of a core's time gets fewer layers",
  ignore: nats.absent || !await limitsCores(),
  async fn() {
    const quota = (index: number) => index === 0 ? 0.25 : undefined;
    const core = (index: number) => index % navigator.hardwareConcurrency;
    // By bandwidth both get three. What else runs on the machine may slow the fast one down meanwhile: then once more.
    const found: string[] = [];
    for (let attempt = 0; attempt < 3; attempt++) {
      await using cluster = await FaultCluster.start(2, { shards: 2 }, { measure: true, quota, core });
      const workers = new Map(cluster.engine.clusterStatus().workers.map((worker) => [worker.id, worker]));
      const [slow, fast] = [workers.get("w0")!, workers.get("w1")!];
      assert.equal(slow.bandwidthGBps, fast.bandwidthGBps);
      const held = ({ layers }: typeof slow) => layers.reduce((sum, [first, end]) => sum + end - first, 0);
      if (slow.msPerLayer! > 1.3 * fast.msPerLayer! && held(slow) < held(fast)) return;
      found.push(`${slow.msPerLayer} and ${fast.msPerLayer} ms a layer: ${held(slow)} and ${held(fast)} layers`);
    }
    assert.fail(found.join("\n"));
  },
});

/** Of all commands here, so that none writes to the user's. */
const cache = mkdtempSync(join(tmpdir(), "lutra-faults-"));
addEventListener("unload", () => rmSync(cache, { recursive: true, force: true }));

/** A command of Lutra's as a process. */
function lutra(permissions: string, ...args: string[]) {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "-q", `-P=${permissions}`, repoPath("mod.ts"), ...args],
    cwd: repoPath(),
    stdin: "null",
    stdout: "piped",
    stderr: "null",
    env: { NO_COLOR: "1", LUTRA_CACHE: cache },
  }).spawn();
  const reader = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  return {
    child,
    /** Reads until `pattern` matches, and returns the match. */
    async until(pattern: RegExp): Promise<RegExpExecArray> {
      for (;;) {
        const found = pattern.exec(text);
        if (found !== null) return found;
        const { value, done } = await reader.read();
        assert(!done, `it ended: ${text}`);
        text += value;
      }
    },
    async end(signal: Deno.Signal): Promise<{ code: number; text: string }> {
      try {
        child.kill(signal);
      } catch { /* it has ended */ }
      for (let next = await reader.read(); !next.done; next = await reader.read()) text += next.value;
      return { code: (await child.status).code, text };
    },
  };
}

/**
 * The live table, on a terminal that `script` makes: it is drawn again and again, and ends with Ctrl-C's signal.
 * Without `exec` a shell may stay between, take the signal too, and end with its own code.
 */
async function table(url: string): Promise<void> {
  const command = `exec "${Deno.execPath()}" run -q -P=worker "${repoPath("mod.ts")}" status --nats ${url} --every 0.2`;
  const child = new Deno.Command("script", {
    ...{ args: ["-qfec", command, "/dev/null"], cwd: repoPath(), stdin: "piped", stdout: "piped", stderr: "null" },
  }).spawn();
  const writer = child.stdin.getWriter();
  const row = /board +ready +0–5 +[\d.]+ +[\d.]+ ms +0 /;
  const patience = setTimeout(() => child.kill("SIGKILL"), 20_000);
  let text = "";
  let stopped = false;
  for await (const part of child.stdout.pipeThrough(new TextDecoderStream())) {
    text += part;
    if (stopped || text.split("\x1b[H").length < 4 || !row.test(text)) continue;
    stopped = true;
    await writer.write(Uint8Array.of(3)); // Ctrl-C
  }
  clearTimeout(patience);
  await writer.close().catch(() => {});
  assert.equal((await child.status).code, 0, text);
  assert.match(text, /device +state +layers +ms\/step +hop RTT +queue +bubbles/);
  assert(stopped, text);
}

Deno.test({
  name: "serve and worker: they find each other in any order, outlive each other's ends, and say what is missing",
  ignore: nats.absent,
  async fn() {
    await using server = await nats.start({ token: "s3cret", jetstream: true });
    const flags = ["--nats", server.url];
    const serve = () =>
      lutra("serve", "serve", MODEL, ...flags, "--no-worker", "--port", "0", "--recovery", "1", "--context", "256");
    const ask = async (url: string) => {
      const body = JSON.stringify({ prompt: "Once upon a time", max_tokens: 30, seed: 3, ignore_eos: true });
      const response = await fetch(`${url}/v1/completions`, { method: "POST", body });
      return { status: response.status, retry: response.headers.get("retry-after"), body: await response.json() };
    };
    const health = async (url: string, status: number) => {
      for (let i = 0;; i++) {
        const response = await fetch(`${url}/healthz`);
        const body = await response.json();
        if (response.status === status) return body;
        assert(i < 600, `healthz stays ${response.status}: ${JSON.stringify(body)}`);
        await new Promise((resolve) => setTimeout(resolve, 50));
      }
    };
    const processes: ReturnType<typeof lutra>[] = [];
    const start = (process: ReturnType<typeof lutra>) => {
      processes.push(process);
      return process;
    };
    try {
      let orchestrator = start(serve());
      let url = (await orchestrator.until(/http:\/\/127\.0\.0\.1:\d+/))[0];
      const early = await ask(url);
      assert.equal(early.status, 503);
      assert(Number(early.retry) > 0);
      assert.match(early.body.error.message, /waiting for workers/);

      const device = start(lutra("worker", "worker", ...flags, "--id", "board", "--bandwidth", "10", "--no-cache"));
      await device.until(/worker board is ready/);
      await health(url, 200);
      const first = await ask(url);
      assert.equal(first.status, 200, JSON.stringify(first.body));
      await table(server.url);
      const status = await lutra("worker", "status", "--json", ...flags).until(/\{.*\}\n/);
      const [board, ...others] = decodeJson(clusterStatusSchema, new TextEncoder().encode(status[0])).workers;
      assert.deepEqual([board!.id, board!.layers, others.length], ["board", [[0, 6]], 0]);
      assert(board!.msPerLayer! > 0 && board!.msHead! > 0, JSON.stringify(board));
      assert(board!.stepMs[0]! > 0 && board!.rttMs! > 0, JSON.stringify(board));

      // Killed without a word, it comes back and finds the worker.
      await orchestrator.end("SIGKILL");
      orchestrator = start(serve());
      url = (await orchestrator.until(/http:\/\/127\.0\.0\.1:\d+/))[0];
      await health(url, 200);
      const again = await ask(url);
      assert.equal(again.body.choices[0].text, first.body.choices[0].text);

      // A second orchestrator is refused.
      const second = start(serve());
      assert.equal((await second.child.status).code, 1);

      // The last worker is lost: requests are told so, and do not hang.
      await device.end("SIGKILL");
      await health(url, 503);
      const late = await ask(url);
      assert.equal(late.status, 503);
      assert.match(late.body.error.message, /there are no workers/);

      const own = ["--id", "board", "--bandwidth", "10", "--no-cache", "--drain", "1"];
      const back = start(lutra("worker", "worker", ...flags, ...own));
      await health(url, 200);
      assert.equal((await ask(url)).body.choices[0].text, first.body.choices[0].text);
      assert.equal((await orchestrator.end("SIGTERM")).code, 0);
      assert.equal((await back.end("SIGTERM")).code, 0);
    } finally {
      for (const process of processes) await process.end("SIGKILL").catch(() => {});
    }
  },
});
