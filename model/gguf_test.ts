import assert from "node:assert/strict";
import { join } from "node:path";
import { fixture } from "../tests/data.ts";
import { randomNumbers, tinyLlama, writeGguf } from "../tests/gguf_writer.ts";
import type { Value } from "../tests/gguf_writer.ts";
import { describeModel } from "./description.ts";
import { GgufError, ModelError } from "./errors.ts";
import { parseGguf, readGguf } from "./gguf.ts";
import type { GgufFile } from "./gguf.ts";
import { tokenizerOf } from "./vocabulary.ts";

/** Parses bytes, and fails when the reader asks for bytes outside the file or for more at once than there are. */
function parse(bytes: Uint8Array): GgufFile {
  return parseGguf("test.gguf", bytes.length, (into, at) => {
    assert.ok(at >= 0 && at + into.length <= bytes.length, "a read outside the file");
    into.set(bytes.subarray(at, at + into.length));
  });
}

function refused(bytes: Uint8Array, field: RegExp, message: RegExp): void {
  assert.throws(() => parse(bytes), (error: unknown) => {
    assert.ok(error instanceof GgufError, String(error));
    assert.match(error.field, field);
    assert.match(error.message, message);
    return true;
  });
}

const tiny = () => tinyLlama();

Deno.test("readGguf: metadata and tensors of a file are as written", () => {
  const { metadata, tensors } = tiny();
  const gguf = parse(writeGguf([...metadata, ["big", { u64: 2n ** 60n }], ["yes", { bool: 1 }]], tensors));
  assert.equal(gguf.version, 3);
  assert.equal(gguf.metadata.get("general.architecture"), "llama");
  assert.equal(gguf.metadata.get("big"), 2n ** 60n);
  assert.equal(gguf.metadata.get("yes"), true);
  assert.equal(gguf.tensors.size, tensors.length);
  const down = gguf.tensors.get("blk.0.ffn_down.weight")!;
  assert.deepEqual([down.shape, down.type, down.bytes, down.offset % 32], [[16, 8], 0, 512, 0]);
  assert.equal(describeModel(gguf).hyper.headDim, 4);
  assert.equal(readGguf(fixture("llama-q-TQ1_0.gguf")).tensors.get("blk.0.attn_q.weight")?.type, 34);
});

Deno.test("readGguf: a file cut anywhere is refused, and nothing behind its end is read", () => {
  const { metadata, tensors } = tiny();
  const whole = writeGguf(metadata, tensors);
  for (let size = 0; size < whole.length; size += size < 800 ? 1 : 97) {
    assert.throws(() => parse(whole.subarray(0, size)), GgufError, `cut at ${size}`);
  }
});

Deno.test("readGguf: hostile headers and metadata are refused by name", () => {
  const { metadata, tensors } = tiny();
  const write = (more: [string, Value][], options = {}) => writeGguf([...metadata, ...more], tensors, options);
  const changed = (at: number, ...bytes: number[]) => {
    const file = write([]);
    file.set(bytes, at);
    return file;
  };
  refused(new TextEncoder().encode("not a model file at all"), /magic/, /not GGUF/);
  refused(changed(4, 0, 0, 0, 3), /version/, /big-endian/);
  refused(write([], { version: 1 }), /version/, /version 1 is not supported/);
  refused(write([], { version: 4 }), /version/, /version 4/);
  refused(write([], { tensorCount: 2n ** 63n }), /tensor count/, /impossibly large/);
  refused(write([], { tensorCount: 2n ** 40n }), /tensor count/, /do not fit/);
  refused(write([], { metadataCount: 2n ** 40n }), /metadata count/, /do not fit/);
  refused(write([["general.architecture", { string: "twice" }]]), /general.architecture/, /twice/);
  refused(write([["general.alignment", { u32: 24 }]]), /alignment/, /power of two/);
  refused(write([["general.alignment", { string: "x" }]]), /alignment/, /power of two/);
  refused(write([["flag", { bool: 2 }]]), /flag/, /boolean is 2/);
  refused(write([["deep", nested(6)]]), /deep/, /nested/);
  refused(write([["kind", { array: [], of: 77 }]]), /kind/, /unknown element type 77/);
  const long = write([["list", { array: [{ u32: 1 }], of: 4 }]]);
  const at = find(long, "list") + 4 + 4 + 4; // behind the key, the type and the element type
  new DataView(long.buffer).setBigUint64(at, 2n ** 50n, true);
  refused(long, /list/, /do not fit/);
  const broken = write([["text", { string: "abcd" }]]);
  broken[find(broken, "abcd")] = 0xff;
  refused(broken, /text/, /UTF-8/);
});

Deno.test("readGguf: a split model's files are read as one, and what is missing or not of it is named", async () => {
  const { metadata, tensors } = tiny();
  const folder = await Deno.makeTempDir({ prefix: "lutra-split-" });
  const path = (i: number, of = 3) => join(folder, `m-0000${i}-of-0000${of}.gguf`);
  const write = (to: string, no: number, count: number, part: typeof tensors, all = tensors.length) => {
    const split: [string, Value][] = [["split.no", { u32: no }], ["split.count", { u32: count }]];
    split.push(["split.tensors.count", { u32: all }]);
    Deno.writeFileSync(to, writeGguf([...(no === 0 ? metadata : []), ...split], part));
  };
  const fails = (at: string, message: RegExp) =>
    assert.throws(() => readGguf(at), (error) => error instanceof GgufError && message.test(error.message));
  try {
    write(path(1), 0, 3, []);
    write(path(2), 1, 3, tensors.slice(0, 5));
    fails(path(1), /m-00003-of-00003\.gguf, one of the model's 3 files, is not beside m-00001/);
    write(path(3), 2, 3, tensors.slice(5));
    const whole = readGguf(path(1));
    assert.deepEqual(whole.files, ["m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]);
    assert.equal(whole.size, [1, 2, 3].reduce((sum, i) => sum + Deno.statSync(path(i)).size, 0));
    assert.deepEqual([...whole.tensors.values()].map(({ file }) => file), tensors.map((_, i) => i < 5 ? 1 : 2));
    assert.equal(describeModel(whole).hyper.layers, 1);
    fails(path(2), /not the first of the model's files: take m-00001-of-00003\.gguf/);
    write(path(3), 2, 3, tensors.slice(4));
    fails(path(1), /of m-00003-of-00003\.gguf occurs twice/);
    write(path(3), 2, 3, tensors.slice(6));
    fails(path(1), /split\.tensors\.count.*is \d+, but the 3 files have \d+ tensors/);
    write(path(3), 1, 3, tensors.slice(5));
    fails(path(1), /m-00003-of-00003\.gguf does not say that it is file 3 of 3/);
    write(join(folder, "m.gguf"), 0, 3, []);
    fails(join(folder, "m.gguf"), /is one of 3 files, but is not named/);
    write(path(1, 2), 0, 60_000, []);
    fails(path(1, 2), /is one of 60000 files/);
    Deno.writeFileSync(path(3), new Uint8Array(9));
    fails(path(1), /magic/);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});

Deno.test("readGguf: hostile tensor tables are refused by name", () => {
  const { metadata, tensors } = tiny();
  const last = tensors.at(-1)!;
  const write = (change: Partial<typeof last>) =>
    writeGguf(metadata, [...tensors.slice(0, -1), { ...last, ...change }]);
  refused(write({ name: "output_norm.weight" }), /output_norm/, /twice/);
  refused(write({ offset: 33 }), /ffn_down/, /not aligned/);
  refused(write({ offset: 0 }), /./, /overlaps/);
  refused(write({ offset: 2 ** 40, data: new Uint8Array(0) }), /ffn_down/, /behind the file/);
  refused(write({ shape: [16, 0] }), /ffn_down/, /dimension 1 is 0/);
  refused(write({ shape: [2 ** 40, 2 ** 40] }), /ffn_down/, /impossibly many/);
  refused(write({ shape: [1, 1, 1, 1, 1] }), /ffn_down/, /5 dimensions/);
  refused(write({ type: 99 }), /ffn_down/, /unknown type 99/);
  refused(write({ type: 2 }), /ffn_down/, /no multiple of Q4_0's 32/);
  refused(write({ name: "" }), /name of tensor/, /0 bytes/);
});

Deno.test("readGguf: 10,000 mutated files are read or refused, nothing else", () => {
  const { metadata, tensors } = tiny();
  const q = Deno.readFileSync(fixture("llama-q-TQ1_0.gguf"));
  const seeds = [writeGguf(metadata, tensors), writeGguf(metadata, tensors, { version: 2 }), q];
  const random = randomNumbers(20261124);
  const outcome = { read: 0, refused: 0, unsupported: 0 };
  for (let i = 0; i < 10_000; i++) {
    // Mostly the small files; of the large one the head is what matters, and it is kept whole for the offsets to be right.
    const seed = seeds[random() % 8 === 0 ? 2 : random() % 2]!;
    const head = Math.min(seed.length, 12_000);
    let file = seed.slice();
    for (let n = 1 + (random() % 4); n > 0; n--) {
      const at = random() % Math.min(head, file.length || 1);
      const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
      switch (random() % 6) {
        case 0:
          file[at]! ^= 1 << (random() % 8);
          break;
        case 1:
          file[at] = random();
          break;
        case 2: // a length or an offset
          if (at + 8 <= file.length) {
            view.setBigUint64(at, [2n ** 64n - 1n, 2n ** 63n, 2n ** 32n, 0n, 1n][random() % 5]!, true);
          }
          break;
        case 3:
          if (at + 4 <= file.length) view.setUint32(at, [0xffff_ffff, 0x7fff_ffff, 0, 9, 8][random() % 5]!, true);
          break;
        case 4:
          file = file.slice(0, random() % (file.length + 1));
          break;
        case 5: { // a piece of the file somewhere else
          const length = Math.min(1 + (random() % 64), file.length - at);
          file.copyWithin(random() % (file.length || 1), at, at + length);
          break;
        }
      }
    }
    try {
      const gguf = parse(file);
      outcome.read++;
      describeModel(gguf);
      tokenizerOf(gguf).encode("The otter \u00e9 \u{1f9a6}");
    } catch (error) {
      assert.ok(error instanceof ModelError, `mutation ${i}: ${(error as Error).stack}`);
      if (error instanceof GgufError) outcome.refused++;
      else outcome.unsupported++;
    }
  }
  // The mutations reach both sides of every check.
  assert.ok(outcome.read > 1000 && outcome.refused > 1000 && outcome.unsupported > 100, JSON.stringify(outcome));
});

function nested(depth: number): Value {
  return depth === 0 ? { u32: 1 } : { array: [nested(depth - 1)], of: depth === 1 ? 4 : 9 };
}

/** Where a text begins in a file. */
function find(bytes: Uint8Array, text: string): number {
  const at = new TextDecoder("latin1").decode(bytes).lastIndexOf(text);
  assert.ok(at > 0);
  return at;
}
