import assert from "node:assert/strict";
import { fixture } from "./data.ts";
import { shardGoldens } from "./shards.ts";

Deno.test("shards.json: the kernels' tests run what models are described as (else run tests/shards.ts)", async () => {
  assert.ok(Deno.readTextFileSync(fixture("shards.json")) === await shardGoldens());
});
