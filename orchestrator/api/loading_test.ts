import assert from "node:assert/strict";
import { createLoadingApp } from "./mod.ts";

Deno.test("createLoadingApp: every route answers 503 with Retry-After and how far loading is", async () => {
  let progress = 0;
  const app = createLoadingApp(() => progress);
  for (const [share, percent] of [[0, 0], [0.437, 43], [1, 100]] as const) {
    progress = share;
    const health = await app.request("/healthz");
    assert.equal(health.status, 503);
    assert.deepEqual(await health.json(), { status: "loading", progress: share });
    for (const request of [["/v1/chat/completions", "POST"], ["/v1/models", "GET"], ["/", "GET"]] as const) {
      const response = await app.request(request[0], { method: request[1] });
      assert.equal(response.status, 503);
      assert.ok(Number(response.headers.get("retry-after")) > 0);
      const { error } = await response.json();
      assert.equal(error.code, "model_loading");
      assert.match(error.message, new RegExp(`\\(${percent} %\\)`));
    }
  }
});
