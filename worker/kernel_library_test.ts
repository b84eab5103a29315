import assert from "node:assert/strict";
import { fixture } from "../tests/data.ts";
import { GGML_TYPES, loadModel } from "../model/mod.ts";
import { shardOf } from "../orchestrator/served_model.ts";
import { KernelError, KernelErrorCode } from "./errors.ts";
import { fakeShard } from "../tests/fakes/kernels.ts";
import { loadKernels } from "./kernel_library.ts";

// Never closed, hence opened before any test: it is no test's leak.
loadKernels();

Deno.test("loadKernels: a missing or foreign library is an error that says what to do", () => {
  assert.throws(() => loadKernels({ path: "/nowhere/liblutra_kernels.so" }), {
    name: "KernelLibraryError",
    message: "the kernel library /nowhere/liblutra_kernels.so is not there: run `deno task build`",
  });
  const { pathname } = new URL(import.meta.url);
  assert.throws(() => loadKernels({ path: pathname }), /cannot be opened: run `deno task build`/);
});

Deno.test("loadKernels: opens a library once and describes the device", () => {
  const kernels = loadKernels();
  assert.equal(loadKernels(), kernels);
  const { isa, available, cores } = kernels.deviceInfo();
  assert(available.includes(isa) && available.includes("portable"), `${isa} of ${available}`);
  assert(cores >= 1);
});

Deno.test("loadKernels: measures bandwidth", async () => {
  const bandwidth = await loadKernels().measureBandwidth(1, 8);
  assert(bandwidth > 0.1 && bandwidth < 10_000, `${bandwidth} GB/s`);
});

Deno.test("LoadedKernels.unpack: Q8_0 and F32 come back exactly", () => {
  const kernels = loadKernels();
  const values = Float32Array.from({ length: 64 }, (_, i) => Math.sin(i));
  assert.deepEqual(kernels.unpack(0, new Uint8Array(values.buffer), 2, 32), values);
  const block = new Uint8Array(34);
  new DataView(block.buffer).setUint16(0, 0x3800, true); // 0.5 as f16
  for (let i = 0; i < 32; i++) block[2 + i] = i - 16;
  assert.deepEqual(kernels.unpack(8, block, 1, 32), Float32Array.from({ length: 32 }, (_, i) => (i - 16) / 2));
  assert.throws(() => kernels.unpack(8, block, 2, 32), KernelError);
  assert.throws(() => kernels.unpack(999, block, 1, 32), KernelError);
});

Deno.test("LoadedKernels.matmul: a product of small integers is exact, with any thread count", () => {
  const kernels = loadKernels();
  const [rows, cols, n] = [5, 32, 3];
  const w = Float32Array.from({ length: rows * cols }, (_, i) => (i % 7) - 3);
  const x = Float32Array.from({ length: n * cols }, (_, i) => (i % 5) - 2);
  const expected = Float32Array.from({ length: n * rows }, (_, at) => {
    let sum = 0;
    for (let k = 0; k < cols; k++) sum += w[(at % rows) * cols + k]! * x[Math.floor(at / rows) * cols + k]!;
    return sum;
  });
  for (const isa of kernels.deviceInfo().available) {
    for (const threads of [1, 2]) {
      assert.deepEqual(kernels.matmul(0, new Uint8Array(w.buffer), rows, cols, x, { threads, isa }), expected);
    }
  }
  assert.throws(() => kernels.matmul(0, new Uint8Array(w.buffer), rows, cols, x, { isa: "abacus" }), /abacus/);
});

Deno.test("openShard: a description that the file does not bear out is refused with a code and the reason", async () => {
  const kernels = loadKernels();
  const choices = { threads: 1, isa: null };
  const { description } = await loadModel(fixture("llama-tiny-f32.gguf"));
  const whole = { first: 0, end: description.hyper.layers };
  const settings = { kv: { type: "f16", tokens: 64 }, maxBatch: 8, context: 64 } as const;
  const lost = shardOf(description, whole, { ...settings, path: "/nowhere.gguf" });
  await assert.rejects(kernels.openShard(lost, choices), (error: KernelError) => {
    assert.equal(error.code, KernelErrorCode.io);
    assert.match(error.message, /nowhere\.gguf/);
    return true;
  });
  // The right description of another, shorter file.
  const other = shardOf(description, whole, { ...settings, path: fixture("goldens.json") });
  await assert.rejects(kernels.openShard(other, choices), (error: KernelError) => {
    assert.equal(error.code, KernelErrorCode.invalidData);
    assert.match(error.message, /tensor \S+/);
    return true;
  });
  await assert.rejects(kernels.openShard(fakeShard({ path: fixture("llama-tiny-f32.gguf") }), choices), KernelError);
});

Deno.test("openShard: keeps packed weights in the cache, and tells of one that it cannot use", async () => {
  const kernels = loadKernels();
  // One matrix that is worth an entry: 4096 × 256 of F32 in a file of its own.
  const [rows, cols] = [4096, 256];
  const shape = { ...fakeShard({ layers: 1, vocab: rows, embedding: cols }) };
  const dir = Deno.makeTempDirSync();
  try {
    const path = `${dir}/weights`;
    const floats = new Float32Array(cols * (rows + 16 * cols));
    floats.forEach((_, i) => floats[i] = (i % 251) / 251);
    Deno.writeFileSync(path, new Uint8Array(floats.buffer));
    const tensor = (...shape: number[]) => ({
      name: "t",
      type: 0,
      shape,
      offset: 0,
      bytes: 4 * shape.reduce((product, size) => product * size, 1),
    });
    const [norm, square] = [{ weight: tensor(cols) }, { weight: tensor(cols, cols) }];
    const mlp = { gate: square, up: square, down: square };
    const layer = { attnNorm: norm, q: square, k: square, v: square, o: square, rope: 0, ffnNorm: norm, mlp };
    const shard = {
      ...shape,
      path,
      kv: { type: "f16", tokens: 32 } as const,
      embedding: tensor(cols, rows),
      head: { norm, output: { weight: tensor(cols, rows) } },
      layers: [layer],
    };
    const open = async (cacheDir: string) => {
      const notes: string[] = [];
      const progress: number[] = [];
      const options = {
        onNote: (text: string) => notes.push(text),
        onProgress: (fraction: number) => progress.push(fraction),
      };
      const choices = { threads: 1, isa: null, cache: { dir: cacheDir, maxBytes: 1e9 } };
      const handle = await kernels.openShard(shard, choices, options);
      const { cachedBytes } = handle.stats();
      handle.close();
      assert.ok(progress.every((fraction) => fraction >= 0 && fraction <= 1));
      return { notes, cachedBytes };
    };
    await new Promise((resolve) => setTimeout(resolve, 3100)); // a file that changed just now is not kept
    const cache = `${dir}/cache`;
    assert.deepEqual(await open(cache), { notes: [], cachedBytes: 0 });
    assert.deepEqual(await open(cache), { notes: [], cachedBytes: 4 * rows * cols });
    const entries = [...Deno.readDirSync(`${cache}/weights`)];
    assert.equal(entries.length, 1);
    Deno.truncateSync(`${cache}/weights/${entries[0]!.name}`, 5000);
    const damaged = await open(cache);
    assert.equal(damaged.cachedBytes, 0);
    assert.match(damaged.notes.join(), /packed anew/);
    const useless = await open(path);
    assert.equal(useless.cachedBytes, 0);
    assert.match(useless.notes.join(), /no cache of packed weights/);
  } finally {
    Deno.removeSync(dir, { recursive: true });
  }
});

Deno.test("tune: measures once for a cache, again when told to, and refuses matrices that there cannot be", async () => {
  const kernels = loadKernels();
  const dir = Deno.makeTempDirSync();
  try {
    const request = {
      threads: 1,
      isa: null,
      cache: { dir, maxBytes: 0 },
      bytes: 1e9,
      matrices: [{ type: 0, rows: 32, cols: 32 }],
    };
    const first = await kernels.tune({ ...request, tune: "auto" });
    assert.deepEqual(first.choices.map(({ type, origin }) => [type, origin]), [["F32", "measured"]]);
    assert.ok(first.trials.length > 0 && first.trials.some(({ chosen }) => chosen));
    assert.deepEqual(first.warnings, []);
    const second = await kernels.tune({ ...request, tune: "auto" });
    assert.deepEqual([second.choices[0]!.origin, second.trials.length, second.seconds], ["stored", 0, 0]);
    assert.deepEqual(second.choices[0]!.plans, first.choices[0]!.plans);
    assert.equal((await kernels.tune({ ...request, tune: "force" })).choices[0]!.origin, "measured");
    assert.equal((await kernels.tune({ ...request, tune: "off" })).choices[0]!.origin, "rule");
    Deno.writeTextFileSync(first.store!, "{}");
    assert.match((await kernels.tune({ ...request, tune: "auto" })).warnings.join(), /are not used/);
    const refused = kernels.tune({ ...request, tune: "auto", matrices: [{ type: 2, rows: 32, cols: 31 }] });
    await assert.rejects(refused, { name: "KernelError", code: KernelErrorCode.invalidArgument });
  } finally {
    Deno.removeSync(dir, { recursive: true });
  }
});

Deno.test("LoadedKernels.unpack: takes the types that the table says, in blocks of the size that it says", () => {
  const kernels = loadKernels();
  for (const { id, name, elements, bytes, trailer, supported } of GGML_TYPES.values()) {
    const unpack = (size: number) => kernels.unpack(id, new Uint8Array(size), 1, elements);
    if (supported) {
      assert.equal(unpack(bytes + trailer).length, elements, name);
      assert.throws(() => unpack(bytes + trailer + 1), KernelError, name);
    } else assert.throws(() => unpack(bytes), { name: "KernelError", message: /is not supported/ }, name);
  }
});
