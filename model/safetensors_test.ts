import assert from "node:assert/strict";
import { join } from "node:path";
import { randomNumbers } from "../tests/gguf_writer.ts";
import { writeSafetensors } from "../tests/safetensors_writer.ts";
import type { SafetensorData } from "../tests/safetensors_writer.ts";
import { SafetensorsError } from "./errors.ts";
import { parseSafetensors, readSafetensorsFolder } from "./safetensors.ts";

/** Parses bytes, and fails when the reader asks for bytes outside the file. */
function parse(bytes: Uint8Array) {
  return parseSafetensors("test.safetensors", bytes.length, (into, at) => {
    assert.ok(at >= 0 && at + into.length <= bytes.length, "a read outside the file");
    into.set(bytes.subarray(at, at + into.length));
  });
}

const tensors: Record<string, SafetensorData> = {
  a: { dtype: "F32", shape: [2, 3], data: new Uint8Array(24) },
  b: { dtype: "BF16", shape: [4], data: new Uint8Array(8) },
  scalar: { dtype: "U8", shape: [], data: new Uint8Array(1) },
  none: { dtype: "I32", shape: [0, 5], data: new Uint8Array(0) },
};

function refused(bytes: Uint8Array, message: RegExp): void {
  assert.throws(() => parse(bytes), (error) => {
    assert.ok(error instanceof SafetensorsError, String(error));
    assert.match(error.message, message);
    return true;
  });
}

Deno.test("parseSafetensors: tensors are as written", () => {
  const bytes = writeSafetensors(tensors);
  const found = parse(bytes);
  assert.deepEqual([...found.keys()], ["a", "b", "scalar", "none"]);
  const { dtype, shape, offset, bytes: size } = found.get("b")!;
  assert.deepEqual([dtype, shape, size], ["BF16", [4], 8]);
  assert.equal(offset, bytes.length - 8 - 1);
});

Deno.test("parseSafetensors: hostile headers are refused by name", () => {
  const change = (patch: Record<string, unknown>) => writeSafetensors(tensors, (table) => ({ ...table, ...patch }));
  const length = (value: bigint) => {
    const bytes = writeSafetensors(tensors);
    new DataView(bytes.buffer).setBigUint64(0, value, true);
    return bytes;
  };
  refused(new Uint8Array(3), /header needs 8 bytes/);
  refused(length(2n ** 63n), /is it a safetensors file/);
  refused(length(10_000n), /more than fit/);
  refused(length(20n), /is no JSON/);
  refused(writeSafetensors(tensors, () => []), /no JSON object/);
  refused(change({ x: 1 }), /tensor x/);
  refused(change({ x: { dtype: "F32", shape: [1], data_offsets: [0, 4], more: 1 } }), /tensor x/);
  refused(change({ x: { dtype: "Q9", shape: [1], data_offsets: [0, 4] } }), /unknown type "Q9"/);
  refused(change({ x: { dtype: "toString", shape: [1], data_offsets: [0, 4] } }), /unknown type/);
  refused(change({ x: { dtype: "F32", shape: [2], data_offsets: [0, 4] } }), /4 bytes, but its shape 2 needs 8/);
  refused(change({ x: { dtype: "F32", shape: [2 ** 50, 2 ** 50], data_offsets: [0, 4] } }), /needs/);
  refused(change({ x: { dtype: "F32", shape: [1], data_offsets: [4, 0] } }), /-4 bytes/);
  refused(change({ x: { dtype: "F32", shape: [1], data_offsets: [-4, 0] } }), /tensor x/);
  refused(change({ x: { dtype: "U8", shape: [9], data_offsets: [33, 42] } }), /ends behind the file/);
  refused(change({ x: { dtype: "U8", shape: [2], data_offsets: [23, 25] } }), /overlaps/);
});

Deno.test("parseSafetensors: a file cut anywhere is refused, mutated ones are read or refused", () => {
  const whole = writeSafetensors(tensors);
  for (let size = 0; size < whole.length; size++) {
    assert.throws(() => parse(whole.subarray(0, size)), SafetensorsError, `cut at ${size}`);
  }
  const random = randomNumbers(20261125);
  let read = 0, refusals = 0;
  for (let i = 0; i < 5000; i++) {
    const file = whole.slice();
    for (let n = 1 + random() % 3; n > 0; n--) {
      const at = random() % (file.length - 33);
      if (random() % 3 === 0) file.copyWithin(random() % file.length, at, at + random() % 30);
      else file[at] = random() % 2 === 0 ? random() : 0x30 + random() % 10;
    }
    try {
      parse(file);
      read++;
    } catch (error) {
      assert.ok(error instanceof SafetensorsError, `mutation ${i}: ${(error as Error).stack}`);
      refusals++;
    }
  }
  assert.ok(read > 100 && refusals > 1000, `${read} read, ${refusals} refused`);
});

Deno.test("readSafetensorsFolder: an index says which file a tensor is in, and no other folder's", async () => {
  const folder = await Deno.makeTempDir();
  const [one, two] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
  Deno.writeFileSync(join(folder, one), writeSafetensors({ a: tensors["a"]! }));
  Deno.writeFileSync(join(folder, two), writeSafetensors({ b: tensors["b"]! }));
  const index = (map: unknown) =>
    Deno.writeTextFileSync(join(folder, "model.safetensors.index.json"), JSON.stringify({ weight_map: map }));
  index({ a: one, b: two });
  const found = readSafetensorsFolder(folder);
  assert.deepEqual([...found.values()].map(({ name, file }) => [name, file]), [["a", join(folder, one)], [
    "b",
    join(folder, two),
  ]]);
  index({ a: one, b: one });
  assert.throws(() => readSafetensorsFolder(folder), /tensor b is not in model-00001/);
  for (const name of ["../x.safetensors", "/etc/passwd", "a/b.safetensors", 3]) {
    index({ a: name });
    assert.throws(() => readSafetensorsFolder(folder), SafetensorsError);
  }
  await Deno.remove(folder, { recursive: true });
});
