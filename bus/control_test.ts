import assert from "node:assert/strict";
import { gzipSync } from "node:zlib";
import {
  clusterSubjects,
  controlReplySchema,
  controlRequestSchema,
  decodeJson,
  encodeJson,
  helloSchema,
} from "./control.ts";
import type { ControlRequest, Hello } from "./control.ts";
import { WireError } from "./errors.ts";
import { checkSubject } from "./subject.ts";

const hello: Hello = {
  type: "hello",
  id: "pi-4",
  state: "ready",
  session: "a-0",
  epoch: 0,
  versions: { abi: 1, wire: 1, lutra: "0.1.0" },
  capabilities: { isa: "neon", cores: 4, memoryBytes: 4e9, bandwidthGBps: null, speed: null },
  work: { queued: 0, runningMs: null, expectedMs: null, stages: [] },
};

const withSpeed = (speed: Record<string, unknown>) => ({
  ...hello,
  capabilities: { ...hello.capabilities, speed: { probe: "a0".repeat(32), msPerLayer: 1, msHead: 1, ...speed } },
});

Deno.test("decodeJson: returns what encodeJson wrote", () => {
  for (const value of [hello, withSpeed({})]) assert.deepEqual(decodeJson(helloSchema, encodeJson(value)), value);
  const release: ControlRequest = { type: "release", epoch: 1, seqs: [1, 2] };
  assert.deepEqual(decodeJson(controlRequestSchema, encodeJson(release)), release);
});

Deno.test("encodeJson: what is long is compressed, and no bytes make decodeJson read without end", () => {
  const release: ControlRequest = { type: "release", epoch: 1, seqs: Array.from({ length: 60_000 }, (_, i) => i) };
  const bytes = encodeJson(release);
  assert(bytes.byteLength < JSON.stringify(release).length / 2, `${bytes.byteLength} bytes`);
  assert.deepEqual(decodeJson(controlRequestSchema, bytes), release);
  for (const cut of [2, 100, bytes.byteLength - 1]) {
    assert.throws(() => decodeJson(controlRequestSchema, bytes.subarray(0, cut)), WireError);
  }
  assert.throws(() => decodeJson(controlRequestSchema, new Uint8Array(gzipSync(new Uint8Array(1 << 27)))), {
    name: "WireError",
    message: "message is not JSON",
  });
});

Deno.test("decodeJson: refuses with the field's name, and throws nothing but WireError", () => {
  const cases: [value: unknown, message: RegExp][] = [
    [{ ...hello, id: "a.b" }, /id: use up to 64/],
    [{ ...hello, extra: 1 }, /extra/],
    [{ ...hello, versions: { abi: -1, wire: 1, lutra: "" } }, /versions.abi/],
    [{ ...hello, capabilities: { ...hello.capabilities, bandwidthGBps: 0 } }, /bandwidthGBps/],
    ...[0, -1, NaN, Infinity, 1e9].map((msPerLayer): [unknown, RegExp] => [withSpeed({ msPerLayer }), /msPerLayer/]),
    ...[-1, NaN, 1e9].map((msHead): [unknown, RegExp] => [withSpeed({ msHead }), /msHead/]),
    [withSpeed({ probe: "a" }), /probe/],
    [null, /message/],
    [[], /message/],
  ];
  for (const [value, message] of cases) {
    const bytes = new TextEncoder().encode(JSON.stringify(value));
    assert.throws(() => decodeJson(helloSchema, bytes), { name: "WireError", message });
  }
  for (const bytes of [new Uint8Array(), Uint8Array.of(0xff), new TextEncoder().encode("{")]) {
    assert.throws(() => decodeJson(controlReplySchema, bytes), WireError);
  }
  for (
    const request of [{ type: "load", epoch: 0, stages: [], results: "r" }, { type: "explode" }, { type: "release" }]
  ) {
    const bytes = new TextEncoder().encode(JSON.stringify(request));
    assert.throws(() => decodeJson(controlRequestSchema, bytes), WireError, request.type);
  }
});

Deno.test("clusterSubjects: names become subjects, other strings are refused", () => {
  const subjects = clusterSubjects("home");
  for (const subject of [subjects.discover, subjects.hello, subjects.control("a"), subjects.results("o")]) {
    checkSubject(subject);
  }
  assert.equal(subjects.stage("pi-4", 2), "lutra.home.worker.pi-4.stage.2");
  for (const name of ["", "a.b", "a b", "*", ">", "a".repeat(65)]) {
    assert.throws(() => clusterSubjects(name), WireError);
    assert.throws(() => subjects.control(name), WireError);
  }
});
