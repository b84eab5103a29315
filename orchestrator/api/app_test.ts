import assert from "node:assert/strict";
import { startCluster } from "../../tests/cluster.ts";
import type { LocalClusterOptions } from "../../cli/local_cluster.ts";
import { fixture } from "../../tests/data.ts";
import { createApp } from "./mod.ts";
import type { AppOptions } from "./mod.ts";

type Post = (path: string, body: unknown, headers?: Record<string, string>) => Promise<Response>;

/** An app over the fixture model, asked without a network. */
async function withApp(
  use: (
    post: Post,
    app: ReturnType<typeof createApp>,
    cluster: Awaited<ReturnType<typeof startCluster>>,
  ) => Promise<void>,
  options: Partial<AppOptions> = {},
  cluster: LocalClusterOptions = {},
): Promise<void> {
  await using running = await startCluster(fixture("llama-tiny-f32.gguf"), cluster);
  const app = createApp({ engine: running.engine, onError: () => {}, ...options });
  const post: Post = async (path, body, headers = {}) =>
    await app.request(path, {
      method: "POST",
      body: typeof body === "string" ? body : JSON.stringify(body),
      headers: { "content-type": "application/json", ...headers },
    });
  await use(post, app, running);
}

const user = [{ role: "user", content: "Hi" }];

Deno.test("validation: a wrong field is refused with 400 and its name", () =>
  withApp(async (post) => {
    for (
      const [path, body, param] of [
        ["chat/completions", { messages: [] }, "messages"],
        ["chat/completions", { messages: [{ role: "robot", content: "x" }] }, "messages.0.role"],
        ["chat/completions", { messages: user, temperature: -1 }, "temperature"],
        ["chat/completions", { messages: user, top_logprobs: 21, logprobs: true }, "top_logprobs"],
        ["chat/completions", { messages: user, tools: [{ type: "function", function: { name: "f" } }] }, "tools"],
        ["chat/completions", { messages: user, response_format: { type: "json_object" } }, "response_format"],
        ["chat/completions", { messages: user, n: 0 }, "n"],
        ["chat/completions", { messages: user, max_tokens: 1.5 }, "max_tokens"],
        ["chat/completions", { messages: user, logit_bias: { x: 1 } }, "logit_bias.x"],
        ["completions", {}, "prompt"],
        ["completions", { prompt: "x", suffix: "y" }, "suffix"],
        ["completions", { prompt: "x", best_of: 3 }, "best_of"],
        ["completions", { prompt: "x", stop: [1] }, "stop"],
        ["completions", { prompt: "x", echo: true, logprobs: 1 }, "echo"],
      ] as const
    ) {
      const response = await post(`/v1/${path}`, body);
      const { error } = await response.json();
      assert.equal(response.status, 400, JSON.stringify(body));
      assert.equal(error.param, param, error.message);
      assert.equal(error.type, "invalid_request_error");
    }
    for (const body of ["{", "[]", "null", "3"]) assert.equal((await post("/v1/completions", body)).status, 400);
    const outside = await post("/v1/completions", { prompt: [5, 100_000] });
    assert.equal(outside.status, 400);
    assert.match((await outside.json()).error.message, /token 1 is 100000/);
  }));

Deno.test("validation: null counts as absent, unknown fields and empty lists are ignored, text parts are joined", () =>
  withApp(async (post) => {
    const parts = [{ type: "text", text: "H" }, { type: "text", text: "i" }];
    const ask = async (messages: unknown, more: object) => {
      const response = await post("/v1/chat/completions", { messages, seed: 1, max_tokens: 5, ...more });
      assert.equal(response.status, 200);
      return (await response.json()).choices[0].message.content;
    };
    const plain = await ask(user, {});
    assert.equal(
      await ask([{ role: "user", content: parts }], { top_p: null, stop: null, tools: [], moon: "full" }),
      plain,
    );
  }));

Deno.test("stream: events are framed as OpenAI frames them", () =>
  withApp(async (post) => {
    const response = await post("/v1/chat/completions", {
      messages: user,
      max_tokens: 4,
      seed: 2,
      stream: true,
      ignore_eos: true,
      stream_options: { include_usage: true },
    });
    assert.match(response.headers.get("content-type")!, /^text\/event-stream/);
    const events = (await response.text()).split("\n\n");
    assert.equal(events.shift(), ": ok");
    assert.equal(events.pop(), "", "the last event ends with an empty line");
    assert.equal(events.pop(), "data: [DONE]");
    const chunks = events.map((event) => JSON.parse(event.replace(/^data: /, "")));
    assert.ok(chunks.every((chunk) => chunk.id === chunks[0].id && /^chatcmpl-/.test(chunk.id)));
    assert.deepEqual(chunks[0].choices[0].delta, { role: "assistant", content: "" });
    const usage = chunks.pop();
    assert.deepEqual(usage.choices, []);
    assert.equal(usage.usage.completion_tokens, 4);
    assert.ok(chunks.every((chunk) => chunk.usage === null));
    assert.deepEqual(chunks.at(-1).choices[0].delta, {});
    assert.equal(chunks.at(-1).choices[0].finish_reason, "length");
    assert.ok(chunks.slice(0, -1).every((chunk) => chunk.choices[0].finish_reason === null));
  }));

Deno.test("limits: a body that is too large is refused with 413, a full queue with 429 and Retry-After", () =>
  withApp(
    async (post, _app, { engine }) => {
      assert.equal((await post("/v1/completions", { prompt: "x".repeat(3000) })).status, 413);
      const stay = new AbortController();
      const blockers = [1, 2].map((i) =>
        engine.generate({ promptTokens: [i, 2, 3], ignoreEos: true, maxTokens: 200 }, { signal: stay.signal })
      );
      const refused = await post("/v1/completions", { prompt: "x" });
      assert.equal(refused.status, 429);
      assert.equal(refused.headers.get("retry-after"), "1");
      assert.equal((await refused.json()).error.code, "queue_full");
      stay.abort();
      for (const blocker of blockers) {
        await assert.rejects(async () => {
          for await (const _ of blocker);
        });
      }
    },
    { maxBodyBytes: 2000 },
    { maxRunning: 1, maxQueued: 1, isa: "portable" },
  ));

Deno.test("healthz: 200 while the engine answers, 503 with a reason afterwards, as the other routes", () =>
  withApp(async (post, app, { engine }) => {
    const before = await app.request("/healthz");
    assert.equal(before.status, 200);
    assert.equal((await before.json()).status, "ok");
    await engine.close();
    const after = await app.request("/healthz");
    assert.equal(after.status, 503);
    assert.match((await after.json()).reason, /closed/);
    const refused = await post("/v1/completions", { prompt: "x" });
    assert.equal(refused.status, 503);
    assert.ok(refused.headers.has("retry-after"));
  }));

Deno.test("routes: unknown ones are 404 in OpenAI's form; other origins are let in only when asked for", async () => {
  await withApp(async (_post, app) => {
    const response = await app.request("/v1/images", { method: "POST" });
    assert.equal(response.status, 404);
    assert.equal((await response.json()).error.type, "invalid_request_error");
    const models = await app.request("/v1/models", { headers: { origin: "http://elsewhere" } });
    assert.equal(models.headers.get("access-control-allow-origin"), null);
    assert.equal((await app.request("/")).status, 404, "no page was given");
  });
  await withApp(async (_post, app) => {
    const models = await app.request("/v1/models", { headers: { origin: "http://elsewhere" } });
    assert.equal(models.headers.get("access-control-allow-origin"), "*");
  }, { cors: true });
});
