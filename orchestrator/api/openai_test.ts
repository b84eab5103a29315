/** A real client, the `openai` npm package, against a real server over loopback. */
import assert from "node:assert/strict";
import OpenAI from "openai";
import { startCluster } from "../../tests/cluster.ts";
import { fixture } from "../../tests/data.ts";
import type { Engine } from "../engine.ts";
import { createApp } from "./mod.ts";

const path = fixture("llama-q-Q4_0.gguf");
const model = "llama-q-Q4_0";

/** Serves the fixture on a free port while `use` runs. */
async function withServer(
  use: (client: OpenAI, engine: Engine, url: string) => Promise<void>,
  options: { apiKey?: string; shards?: number } = {},
): Promise<void> {
  await using cluster = await startCluster(path, { shards: options.shards ?? 1 });
  const { engine } = cluster;
  const app = createApp({ engine, ...(options.apiKey === undefined ? {} : { apiKey: options.apiKey }) });
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {} }, app.fetch);
  const url = `http://127.0.0.1:${server.addr.port}`;
  try {
    const client = new OpenAI({ apiKey: options.apiKey ?? "unused", baseURL: `${url}/v1`, maxRetries: 0 });
    await use(client, engine, url);
  } finally {
    await server.shutdown();
  }
}

/** Waits until nothing runs, for at most two seconds. */
async function idle(engine: Engine): Promise<void> {
  for (let i = 0; i < 200 && engine.stats().running + engine.stats().waiting > 0; i++) {
    await new Promise((done) => setTimeout(done, 10));
  }
  const { running, waiting, kvBlocksUsed } = engine.stats();
  assert.deepEqual({ running, waiting, kvBlocksUsed }, { running: 0, waiting: 0, kvBlocksUsed: 0 });
}

Deno.test("openai client: chat, whole and streamed, give the same text and usage", () =>
  withServer(async (client) => {
    const request = {
      model,
      messages: [{ role: "system" as const, content: "Be brief." }, { role: "user" as const, content: "Hello" }],
      max_tokens: 24,
      seed: 11,
      temperature: 0.9,
    };
    const whole = await client.chat.completions.create(request);
    assert.equal(whole.object, "chat.completion");
    assert.equal(whole.choices[0]!.message.role, "assistant");
    let text = "";
    let usage: OpenAI.CompletionUsage | null | undefined;
    let finish: string | null = null;
    const stream = await client.chat.completions.create({
      ...request,
      stream: true,
      stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
      assert.equal(chunk.object, "chat.completion.chunk");
      text += chunk.choices[0]?.delta.content ?? "";
      finish = chunk.choices[0]?.finish_reason ?? finish;
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0]!.message.content);
    assert.equal(finish, whole.choices[0]!.finish_reason);
    assert.deepEqual(usage, whole.usage);
    assert.ok(usage!.completion_tokens <= 24 && usage!.prompt_tokens > 0);
  }));

Deno.test("openai client: completions with several prompts and choices; a choice's seed is the request's plus its number", () =>
  withServer(async (client) => {
    const request = { model, prompt: ["The otter", "Nobody on"], max_tokens: 8, n: 2, seed: 5 };
    const both = await client.completions.create(request);
    assert.deepEqual(both.choices.map((choice) => choice.index), [0, 1, 2, 3]);
    for (const [index, prompt, seed] of [[0, "The otter", 5], [1, "The otter", 6], [3, "Nobody on", 6]] as const) {
      const one = await client.completions.create({ model, prompt, max_tokens: 8, seed });
      assert.equal(one.choices[0]!.text, both.choices[index]!.text);
    }
    const streamed = ["", "", "", ""];
    for await (const chunk of await client.completions.create({ ...request, stream: true })) {
      for (const choice of chunk.choices) streamed[choice.index] += choice.text;
    }
    assert.deepEqual(streamed, both.choices.map((choice) => choice.text));
  }));

Deno.test("openai client: log-probabilities are those of the distribution, and echo gives the prompt back", () =>
  withServer(async (client) => {
    const chat = await client.chat.completions.create({
      model,
      messages: [{ role: "user", content: "Hello" }],
      max_completion_tokens: 6,
      temperature: 0,
      logprobs: true,
      top_logprobs: 5,
    });
    const content = chat.choices[0]!.logprobs!.content!;
    assert.ok(content.length >= 1);
    for (const { logprob, top_logprobs: top } of content) {
      assert.equal(top.length, 5);
      assert.equal(logprob, top[0]!.logprob, "the greedy token is the most probable one");
      assert.ok(top.every((t, i) => i === 0 || t.logprob <= top[i - 1]!.logprob));
      assert.ok(top.reduce((sum, t) => sum + Math.exp(t.logprob), 0) <= 1 + 1e-5);
    }
    const legacy = await client.completions.create({
      model,
      prompt: "The otter",
      max_tokens: 4,
      temperature: 0,
      logprobs: 2,
    });
    const { tokens, text_offset: offsets } = legacy.choices[0]!.logprobs!;
    assert.equal(tokens!.length, offsets!.length);
    const echo = await client.completions.create({
      model,
      prompt: "The otter",
      max_tokens: 4,
      temperature: 0,
      echo: true,
    });
    assert.equal(echo.choices[0]!.text, `The otter${legacy.choices[0]!.text}`);
  }));

Deno.test("openai client: stop strings end the text before them", () =>
  withServer(async (client) => {
    const request = { model, prompt: "The otter", max_tokens: 40, seed: 3 };
    const full = (await client.completions.create(request)).choices[0]!.text;
    const stop = full.slice(6, 9);
    const cut = (await client.completions.create({ ...request, stop: [stop, "never to be seen"] })).choices[0]!;
    assert.equal(cut.text, full.slice(0, full.indexOf(stop)));
    assert.equal(cut.finish_reason, "stop");
  }));

Deno.test("openai client: lists the model, and gets errors of the right class", () =>
  withServer(async (client) => {
    assert.deepEqual((await client.models.list()).data.map((m) => m.id), [model]);
    assert.equal((await client.models.retrieve(model)).id, model);
    await assert.rejects(client.models.retrieve("gpt-9"), OpenAI.NotFoundError);
    await assert.rejects(
      client.chat.completions.create({ model: "gpt-9", messages: [{ role: "user", content: "x" }] }),
      (error: unknown) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
    );
    await assert.rejects(
      client.completions.create({ model, prompt: "otter ".repeat(500) }),
      (error: unknown) => error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded",
    );
  }));

Deno.test("openai client: an API key is asked for", () =>
  withServer(async (client, _engine, url) => {
    assert.equal((await client.models.list()).data.length, 1);
    const stranger = new OpenAI({ apiKey: "guess", baseURL: `${url}/v1`, maxRetries: 0 });
    await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
    const health = await fetch(`${url}/healthz`);
    assert.equal((await health.json()).status, "ok");
  }, { apiKey: "otter" }));

Deno.test("disconnect: a client that leaves stops the generation on the workers, streamed or not", () =>
  withServer(async (client, engine) => {
    const request = { model, prompt: "The otter", max_tokens: 120, ignore_eos: true, n: 4 };
    const stream = await client.completions.create({ ...request, stream: true });
    for await (const _ of stream) break; // aborts the request
    await idle(engine);
    const leave = new AbortController();
    const whole = client.completions.create(request, { signal: leave.signal });
    while (engine.stats().running === 0) await new Promise((done) => setTimeout(done, 1));
    leave.abort();
    await assert.rejects(whole);
    await idle(engine);
  }));

for (const shards of [1, 2]) {
  Deno.test(`concurrency: 32 requests at once answer what they answer one after the other, ${shards} shards`, () =>
    withServer(async (client, engine) => {
      const ask = async (i: number): Promise<string> => {
        const request = { model, max_tokens: 6 + (i % 5) * 4, seed: i, temperature: 1 + (i % 3) / 4 };
        const messages = [{ role: "user" as const, content: `Tell me ${i}: ${"of the river ".repeat(i % 4)}` }];
        switch (i % 3) {
          case 0: {
            let text = "";
            const stream = await client.chat.completions.create({ ...request, messages, stream: true });
            for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
            return text;
          }
          case 1:
            return (await client.chat.completions.create({ ...request, messages })).choices[0]!.message.content!;
          default:
            return (await client.completions.create({ ...request, prompt: `Otter ${i}` })).choices[0]!.text;
        }
      };
      const one: string[] = [];
      for (let i = 0; i < 32; i++) one.push(await ask(i));
      assert.ok(new Set(one).size > 16);
      const together = await Promise.all(Array.from({ length: 32 }, (_, i) => ask(i)));
      assert.deepEqual(together, one);
      await idle(engine);
    }, { shards }));
}
