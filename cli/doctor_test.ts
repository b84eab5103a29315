import assert from "node:assert/strict";
import { join } from "node:path";
import { ABI_VERSION, clusterSubjects, encodeJson, encodeProbeReply, NatsBus, WIRE_VERSION } from "../bus/mod.ts";
import type { Finding, Hello } from "../bus/mod.ts";
import { repoPath } from "../tests/data.ts";
import { FakeKernels } from "../tests/fakes/kernels.ts";
import { nats } from "../tests/nats.ts";
import { deviceHealth } from "../worker/health.ts";
import { Worker } from "../worker/worker.ts";

type Placed = Finding & { where: string };
const MODEL = repoPath("models", "lutra-books-6M-TQ2_0.gguf");

/** Runs `doctor` as a user does. */
async function doctor(args: string[], env: Record<string, string> = {}) {
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-q", "-P=doctor", repoPath("mod.ts"), "doctor", "--json", ...args],
    cwd: repoPath(),
    env: { NO_COLOR: "1", ...env },
  }).output();
  const text = new TextDecoder().decode(stdout);
  assert.notEqual(text, "", new TextDecoder().decode(stderr));
  const { ok, findings } = JSON.parse(text) as { ok: boolean; findings: Placed[] };
  assert.equal(ok, code === 0);
  for (const { check, state, fix } of findings) assert(state === "ok" || fix !== undefined, `${check} has no fix`);
  return {
    code,
    findings,
    of(where: string, check: string): Placed {
      const found = findings.find((finding) => finding.where === where && finding.check === check);
      assert(found !== undefined, `${where}, ${check} is not among ${JSON.stringify(findings, undefined, 1)}`);
      return found;
    },
  };
}

function test(name: string, fn: () => Promise<void>): void {
  Deno.test({ name: `doctor: ${name}`, ignore: nats.absent, fn });
}

test("a cluster that is well passes, with every worker's own findings", async () => {
  await using server = await nats.start({ jetstream: true });
  const bus = await NatsBus.connect({ servers: server.url });
  const worker = await Worker.start({
    ...{ bus, kernels: new FakeKernels(), id: "board", cluster: "lutra", memoryBytes: 1e9 },
    diagnose: (model) => deviceHealth({ cores: 1, ...(model === undefined ? {} : { model }) }),
  });
  const { code, findings, of } = await doctor([MODEL, "--nats", server.url, "--wait", "0.5"]);
  const failed = findings.filter(({ state }) => state === "failed");
  // Heat and power are the machine's own affair.
  assert.deepEqual(failed.filter(({ check }) => check !== "heat" && check !== "power"), []);
  assert.equal(code, failed.length === 0 ? 0 : 1);
  for (const check of ["version", "clock", "hop", "link", "model"]) assert.equal(of("board", check).state, "ok", check);
  assert.match(of("board", "link").detail, /^\d+ Mbit\/s/);
  assert.match(of("server", "version").detail, /^nats-server \d+\.\d+\.\d+$/);
  assert.equal(of("cluster", "workers").detail, "1 answer");
  assert.match(of("cluster", "orchestrator").detail, /nobody serves/);
  await worker.close();
  await bus.close();
});

test("no server, wrong credentials, a cache that cannot be written and a missing model fail, and say what helps", async () => {
  await using server = await nats.start({ token: "right" });
  const { port } = server;
  const file = await Deno.makeTempFile();
  try {
    const refused = await doctor([`${MODEL}.none`, "--nats", `wrong@127.0.0.1:${port}`], {
      LUTRA_CACHE: join(file, "cache"),
    });
    assert.equal(refused.code, 1);
    assert.match(refused.of("server", "connection").detail, /refuses these credentials/);
    assert.match(refused.of("server", "connection").fix!, /token/);
    assert.match(refused.of("this device", "cache").detail, /is no folder/);
    assert.equal(refused.of("this device", "model").state, "failed");
  } finally {
    await Deno.remove(file);
  }
  await server.stop();
  const gone = await doctor(["--nats", `right@127.0.0.1:${port}`]);
  assert.equal(gone.code, 1);
  assert.match(gone.of("server", "connection").detail, /no NATS server answers/);
  assert.match(gone.of("server", "connection").fix!, /--nats embedded/);
});

test("an old worker, a wrong clock, a slow link, small messages and a worker that does not answer are found", async () => {
  await using server = await nats.start({ config: "max_payload: 65536" });
  const bus = await NatsBus.connect({ servers: server.url });
  const subjects = clusterSubjects("lutra");
  const hello = (id: string, versions: Hello["versions"]) =>
    bus.publish(subjects.hello, new TextEncoder().encode(JSON.stringify({ type: "hello", id, versions })));
  const same = { abi: ABI_VERSION, wire: WIRE_VERSION };
  bus.subscribe(subjects.discover, () => {
    hello("ancient", { ...same, wire: WIRE_VERSION + 1, lutra: "0.0.1" });
    hello("newer", { ...same, lutra: "9.9.9" });
    hello("mute", { ...same, lutra: "0.1.0" });
  });
  const timers = new Set<ReturnType<typeof setTimeout>>();
  bus.subscribe(subjects.probe("newer"), (message) => {
    const timer = setTimeout(() => {
      timers.delete(timer);
      message.respond(encodeProbeReply(Date.now() - 120_000, message.data));
    }, 60);
    timers.add(timer);
  });
  const finding: Finding = { check: "cache", state: "failed", detail: "nothing can be kept", fix: "mend it" };
  bus.subscribe(subjects.diagnose("newer"), (message) => message.respond(encodeJson({ findings: [finding] })));
  bus.subscribe(subjects.orchestrator, (message) => message.respond(Uint8Array.of(1)));
  await bus.flush();
  const { code, of } = await doctor(["--nats", server.url, "--wait", "0.5"]);
  assert.equal(code, 1);
  assert.match(of("ancient", "version").detail, /^Lutra 0\.0\.1 \(wire \d+, .*they cannot work together/);
  assert.equal(of("newer", "version").state, "warning");
  assert.match(of("newer", "clock").detail, /^1(19|20)\.\d s behind/);
  assert.equal(of("newer", "clock").state, "failed");
  assert.match(of("newer", "clock").fix!, /timedatectl/);
  assert.equal(of("newer", "hop").state, "warning");
  assert.equal(of("newer", "link").state, "warning"); // 4 × 64 KiB in 60 ms
  assert.deepEqual(of("newer", "cache"), { where: "newer", ...finding });
  assert.match(of("mute", "answer").detail, /nobody answers/);
  assert.equal(of("server", "payload").state, "failed");
  assert.equal(of("server", "JetStream").state, nats.stores ? "warning" : "ok");
  assert.match(of("cluster", "orchestrator").detail, /no proper answer/);
  for (const timer of timers) clearTimeout(timer);
  await bus.close();
});

Deno.test("doctor: kernels that were not built are told, with the command that builds them", async () => {
  const { code, of } = await doctor([], { LUTRA_KERNELS: repoPath("kernels", "target", "release", "none.so") });
  assert.equal(code, 1);
  assert.match(of("this device", "kernels").detail, /is not there/);
  assert.equal(of("this device", "kernels").fix, "deno task build");
});
