import assert from "node:assert/strict";
import OpenAI from "openai";
import { fixture, repoPath } from "../tests/data.ts";

/** Runs the command line as a user does. */
async function lutra(args: string[], options: { stdin?: string; permissions?: string } = {}) {
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", `-P=${options.permissions ?? "run"}`, repoPath("mod.ts"), ...args],
    cwd: repoPath(),
    stdin: options.stdin === undefined ? "null" : "piped",
    stdout: "piped",
    stderr: "piped",
    env: { NO_COLOR: "1", LUTRA_CACHE: "/dev/null" }, // nothing in the fixtures is worth an entry; nothing is kept by mistake
  }).spawn();
  if (options.stdin !== undefined) {
    const writer = child.stdin.getWriter();
    await writer.write(new TextEncoder().encode(options.stdin));
    await writer.close();
  }
  const { code, stdout, stderr } = await child.output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

const model = fixture("llama-q-Q4_0.gguf");

Deno.test("run: the same seed prints the same answer, on one and on two shards, from argument and standard input", async () => {
  const flags = ["--raw", "--max-tokens", "12", "--seed", "5", "--threads", "1"];
  const one = await lutra(["run", model, "The otter", ...flags]);
  assert.equal(one.code, 0, one.stderr);
  assert.ok(one.stdout.startsWith("The otter"));
  assert.ok(one.stdout.length > "The otter\n".length);
  assert.match(one.stderr, /answer 12 tokens/);
  const two = await lutra(["run", model, "-", ...flags, "--shards", "2"], { stdin: "The otter\n" });
  assert.equal(two.stdout, one.stdout);
});

Deno.test("run --json: prints one object with usage", async () => {
  const { code, stdout } = await lutra(["run", model, "Hello", "--json", "--max-tokens", "5", "--temperature", "0"]);
  assert.equal(code, 0);
  const result = JSON.parse(stdout);
  assert.equal(result.prompt, "Hello");
  assert.ok(result.usage.completionTokens <= 5);
});

Deno.test("run: holds a conversation line by line", async () => {
  const { code, stdout, stderr } = await lutra(["run", model, "--max-tokens", "4", "--seed", "1"], {
    stdin: "Hello\nAnd you?\n/exit\n",
  });
  assert.equal(code, 0, stderr);
  assert.equal(stderr.match(/answer \d+ tokens/g)?.length, 2, stderr);
  assert.ok(stdout.length > 0);
});

Deno.test("run: a model without chat template continues the text, or writes turns plainly, and says so", async () => {
  const base = fixture("llama-tiny-f16.gguf");
  const flags = ["--max-tokens", "4", "--seed", "1"];
  const plain = await lutra(["run", base, "The otter", ...flags]);
  assert.match(plain.stderr, /warning: the model has no chat template; it continues the text/);
  assert.ok(plain.stdout.startsWith("The otter"), plain.stdout);
  const system = await lutra(["run", base, "Hello", "--system", "Be brief.", ...flags]);
  assert.match(system.stderr, /warning: the model has no chat template; turns are written as `User: …`/);
  assert.doesNotMatch((await lutra(["run", base, "Hello", "--raw", ...flags])).stderr, /warning/);
});

Deno.test("inspect: tells of a model, as text and as JSON", async () => {
  const text = await lutra(["inspect", model]);
  assert.equal(text.code, 0, text.stderr);
  assert.match(text.stdout, /5 layers of 256/);
  assert.match(text.stdout, /Q4_0 +37/);
  assert.match(text.stdout, /llama, \d+\.\d M parameters of 4\.\d\d bits/);
  assert.match(text.stdout, /chat template: without tools/);
  assert.match(text.stdout, /needs 1\.798 MB of memory for weights, and 20\.97 MB for a cache of 8192 tokens/);
  const json = JSON.parse((await lutra(["inspect", model, "--json", "--tensors"])).stdout);
  assert.equal(json.supported, true);
  assert.equal(json.hyper.layers, 5);
  assert.equal(json.tensors.length, 48);
  assert.equal(json.memory.cache, 5 * 8192 * 2 * (2 * 64) * 2); // layers, tokens, K and V, KV heads, bytes
  assert.equal(json.chatTemplate, "without tools");
  const ids = JSON.parse((await lutra(["inspect", fixture("architectures/qwen2moe.gguf"), "--json"])).stdout);
  assert.equal(ids.architecture, "qwen2moe");
  assert.equal(ids.chatTemplate, "none");
  assert.match(ids.warnings.join(), /no vocabulary/);
});

Deno.test("tune: shows what was measured and chosen", async () => {
  const { code, stdout, stderr } = await lutra([
    "tune",
    fixture("llama-tiny-f16.gguf"),
    "--threads",
    "1",
    "--no-cache",
  ]);
  assert.equal(code, 0, stderr);
  assert.match(stdout, /^\* F16 320 × 64 +256 +floatf16 +\S+ +\d+ +\d+ KiB +1 +[\d.]+ +[\d.]+ +[\d.]+$/m);
  assert.match(stdout, /^F16 320 × 64 +measured +floatf16/m);
  assert.match(stdout, /^not kept$/m);
});

Deno.test("bench --json: reports rates and their share of the bandwidth", async () => {
  const flags = ["--prompt-tokens", "8", "--gen-tokens", "4", "--repetitions", "1", "--bandwidth-mib", "16"];
  const { code, stdout, stderr } = await lutra(["bench", model, "--json", ...flags]);
  assert.equal(code, 0, stderr);
  const result = JSON.parse(stdout);
  assert.ok(result.prefillTokS > 0 && result.decodeTokS > 0 && result.bandwidthGBps > 0 && result.share > 0);
  assert.equal(result.weightBytesPerStep > 1e5, true);
});

Deno.test({
  name: "serve: answers a real client over HTTP until it is told to stop, then ends in order",
  ignore: Deno.build.os === "windows", // no SIGTERM there
  async fn() {
    const child = new Deno.Command(Deno.execPath(), {
      args: ["run", "-P=serve", repoPath("mod.ts"), "serve", model, "--port", "0", "--shards", "2", "--threads", "1"],
      cwd: repoPath(),
      stdout: "piped",
      stderr: "null",
    }).spawn();
    const output = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    while (!text.includes("\n")) {
      const { value, done } = await output.read();
      assert.ok(!done, `the server ended: ${text}`);
      text += value;
    }
    const url = /http:\/\/127\.0\.0\.1:\d+/.exec(text)?.[0];
    assert.ok(url, text);
    assert.match(text, /2 × 1 threads/);
    const client = new OpenAI({ apiKey: "unused", baseURL: `${url}/v1`, maxRetries: 0 });
    const request = {
      model: "llama-q-Q4_0",
      messages: [{ role: "user" as const, content: "Hello" }],
      max_tokens: 12,
      seed: 4,
    };
    let streamed = "";
    for await (const chunk of await client.chat.completions.create({ ...request, stream: true })) {
      streamed += chunk.choices[0]?.delta.content ?? "";
    }
    assert.equal(streamed, (await client.chat.completions.create(request)).choices[0]!.message.content);
    const page = await fetch(url);
    assert.match(await page.text(), /<title>Lutra<\/title>/);
    // Told to stop in the middle of an answer, it finishes that one.
    const last = await client.completions.create({
      ...{ model: "llama-q-Q4_0", prompt: "The", max_tokens: 100, stream: true as const },
      ...{ ignore_eos: true }, // Lutra's own
    });
    let pieces = 0;
    let reason: string | null = null;
    for await (const chunk of last) {
      if (pieces++ === 0) child.kill("SIGTERM");
      reason = chunk.choices[0]?.finish_reason ?? reason;
    }
    assert.equal(reason, "length");
    while (!(await output.read()).done);
    assert.equal((await child.status).code, 0);
  },
});

for (
  const [what, args, code, message] of [
    [
      "a model that is not there",
      ["run", fixture("missing.gguf"), "x"],
      1,
      /there is no file .*missing\.gguf.*There are .*\.gguf/,
    ],
    ["a file that is no GGUF", ["run", fixture("goldens.json"), "x"], 1, /is no GGUF file/],
    ["an option out of range", ["run", model, "x", "--top-p", "7"], 2, /number from 0 to 1/],
    ["a cluster's command without a server", ["status"], 2, /--nats says where the cluster's NATS server is/],
    ["an unknown command", ["walk"], 2, /unknown command 'walk'/],
    ["a prompt that is too long", ["run", model, "otter ".repeat(400), "--raw"], 1, /context/],
    ["more shards than layers", ["run", model, "x", "--shards", "9"], 1, /layer/],
    ["an instruction set that is not there, by serve", ["serve", model, "--port", "0", "--isa", "mmx"], 1, /mmx/],
    ["an instruction set that is not there", ["run", model, "x", "--isa", "mmx"], 1, /mmx.*available: portable/],
  ] as const
) {
  Deno.test(`errors: ${what} is told in one line, without a stack`, async () => {
    const result = await lutra([...args], args[0] === "serve" ? { permissions: "serve" } : {});
    assert.equal(result.code, code, result.stderr);
    assert.match(result.stderr, message);
    assert.doesNotMatch(result.stderr, /^ +at /m);
  });
}
