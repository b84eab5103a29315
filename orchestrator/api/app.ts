import { createHash, timingSafeEqual } from "node:crypto";
import { Hono } from "hono";
import type { Context } from "hono";
import { bodyLimit } from "hono/body-limit";
import { cors } from "hono/cors";
import type { z } from "zod";
import type { Engine } from "../engine.ts";
import { toolCallMark, ToolCallParser } from "../../model/mod.ts";
import type { ChatMessage, ChatTool, ToolCall } from "../../model/mod.ts";
import type { GenerateEvent, Usage } from "../request.ts";
import { ApiError, toApiError } from "./errors.ts";
import { finish, logprobsOf, startGeneration } from "./generation.ts";
import type { FinishedChoice, Generation, TokenLogprobs } from "./generation.ts";
import { chatSchema, completionSchema, refuseUnsupported } from "./schema.ts";
import type { ChatBody, CommonBody, CompletionBody } from "./schema.ts";
import { eventStream } from "./sse.ts";

/** Options of {@linkcode createApp}. */
export interface AppOptions {
  engine: Engine;
  /** The model's name for clients. Default: the engine's. */
  modelId?: string;
  /** Asked of clients as a bearer token. Default: none is needed. */
  apiKey?: string;
  /** Let pages of other origins use the API. @default {false} */
  cors?: boolean;
  /** HTML served at `/`. */
  page?: string;
  /** Most bytes of a request's body. @default {4194304} */
  maxBodyBytes?: number;
  /** Told of errors that clients are not told of. Default: `console.error`. */
  onError?: (error: unknown) => void;
}

const CHAT = { object: "chat.completion", chunk: "chat.completion.chunk", prefix: "chatcmpl" } as const;
const COMPLETION = { object: "text_completion", chunk: "text_completion", prefix: "cmpl" } as const;

/** The HTTP interface: OpenAI's chat, completion and model routes, a health check and the web page. */
export function createApp(options: AppOptions): Hono {
  const { engine, apiKey, page, maxBodyBytes = 4 << 20 } = options;
  const modelId = options.modelId ?? engine.model.id;
  const created = Math.floor(Date.now() / 1000);
  const app = new Hono();
  const fail = (c: Context, error: unknown) => {
    const known = toApiError(error);
    if (known.status >= 500) (options.onError ?? console.error)(error);
    return c.json(known.body, known.status, { ...known.headers });
  };
  app.onError((error, c) => fail(c, error));
  app.notFound((c) => fail(c, new ApiError(404, `there is no ${c.req.method} ${c.req.path}`, { code: "not_found" })));

  if (options.cors === true) app.use("/v1/*", cors());
  if (apiKey !== undefined) {
    const digest = (text: string) => createHash("sha256").update(text).digest();
    const wanted = digest(`Bearer ${apiKey}`);
    app.use("/v1/*", async (c, next) => {
      if (c.req.method !== "OPTIONS" && !timingSafeEqual(digest(c.req.header("authorization") ?? ""), wanted)) {
        throw new ApiError(401, "the API key is missing or wrong", {
          type: "authentication_error",
          code: "invalid_api_key",
          headers: { "www-authenticate": "Bearer" },
        });
      }
      await next();
    });
  }
  app.use(
    "/v1/*",
    bodyLimit({
      maxSize: maxBodyBytes,
      onError: (c) => fail(c, new ApiError(413, `the body exceeds ${maxBodyBytes} bytes`, { code: "body_too_large" })),
    }),
  );

  if (page !== undefined) {
    const headers = pageHeaders(page);
    app.get("/", (c) => c.html(page, 200, headers));
  }
  app.get("/healthz", (c) => {
    const { failure } = engine;
    if (failure !== undefined) {
      const { state, loading } = engine.state;
      const devices = loading.map(({ worker, phase, share, etaMs }) => ({
        id: worker,
        phase,
        progress: share,
        eta_seconds: etaMs === null ? null : Math.ceil(etaMs / 1000),
      }));
      const body = { status: state, reason: failure.message, ...(devices.length === 0 ? {} : { devices }) };
      return c.json(body, 503, { ...toApiError(failure).headers });
    }
    const { running, waiting } = engine.stats();
    return c.json({ status: "ok", model: modelId, running, waiting });
  });
  const modelObject = { id: modelId, object: "model", created, owned_by: "lutra" };
  app.get("/v1/models", (c) => c.json({ object: "list", data: [modelObject] }));
  app.get("/v1/models/:id{.+}", (c) => {
    checkModel(c.req.param("id"));
    return c.json(modelObject);
  });
  app.post("/v1/chat/completions", async (c) => {
    const body = await readBody(c, chatSchema);
    const topLogprobs = body.logprobs === true ? body.top_logprobs ?? 0 : undefined;
    const maxTokens = body.max_completion_tokens ?? body.max_tokens;
    const { tokens, opening } = chatPrompt(engine, body);
    const generation = startGeneration(engine, body, [tokens], {
      maxTokens,
      topLogprobs,
      signal: c.req.raw.signal,
    });
    return body.stream === true ? streamChat(body, generation, opening) : await wholeChat(c, body, generation, opening);
  });
  app.post("/v1/completions", async (c) => {
    const body = await readBody(c, completionSchema);
    if (body.echo === true && body.logprobs !== undefined) {
      throw new ApiError(400, "echo with logprobs is not supported", { param: "echo", code: "unsupported_parameter" });
    }
    const prompts = completionPrompts(engine, body);
    const generation = startGeneration(engine, body, prompts, {
      maxTokens: body.max_tokens ?? 16, // OpenAI's default
      topLogprobs: body.logprobs,
      signal: c.req.raw.signal,
    });
    const echoes = prompts.map((ids) => body.echo === true ? engine.model.tokenizer.decode(ids) : "");
    return body.stream === true
      ? streamCompletion(body, generation, echoes)
      : await wholeCompletion(c, body, generation, echoes);
  });

  function checkModel(model: string | undefined): void {
    if (model === undefined || model === modelId) return;
    throw new ApiError(404, `the model ${JSON.stringify(model)} does not exist; there is ${JSON.stringify(modelId)}`, {
      param: "model",
      code: "model_not_found",
    });
  }

  async function readBody<T extends z.ZodType<{ model?: string | undefined }>>(
    c: Context,
    schema: T,
  ): Promise<z.infer<T>> {
    let value: unknown;
    try {
      value = JSON.parse(await c.req.text());
    } catch (cause) {
      throw new ApiError(400, "the body is not JSON", { cause });
    }
    if (typeof value !== "object" || value === null || Array.isArray(value)) {
      throw new ApiError(400, "the body is no JSON object");
    }
    refuseUnsupported(value as Record<string, unknown>);
    const body = schema.parse(value);
    checkModel(body.model);
    return body;
  }

  function envelope(kind: typeof CHAT | typeof COMPLETION, stream: boolean) {
    return {
      id: `${kind.prefix}-${crypto.randomUUID().replaceAll("-", "")}`,
      object: stream ? kind.chunk : kind.object,
      created: Math.floor(Date.now() / 1000),
      model: modelId,
    };
  }

  async function whole(
    generation: Generation,
    ignoreEos: boolean,
    textOf?: (event: TokenEvent) => string,
  ): Promise<FinishedChoice[]> {
    try {
      return await Promise.all(generation.choices.map((choice) => finish(engine, choice, ignoreEos, textOf)));
    } catch (error) {
      generation.abort();
      throw error;
    }
  }

  /** An event's text with the special tokens that structure calls of tools. */
  const markedText = (event: TokenEvent) => event.text + toolCallMark(engine.model.tokenizer, event.id);

  async function wholeChat(c: Context, body: ChatBody, generation: Generation, opening: string): Promise<Response> {
    const tools = toolsOf(body);
    const done = await whole(generation, body.ignore_eos === true, tools.length > 0 ? markedText : undefined);
    const choices = done.map(({ index, text, tokens, reason }) => {
      const parser = new ToolCallParser(tools.map((tool) => tool.function.name));
      const parts = tools.length > 0 ? [parser.push(opening + text), parser.flush()] : [{ text, calls: [] }];
      const calls = parts.flatMap((part) => part.calls).map((call) => apiCall(call));
      const content = parts.map((part) => part.text).join("");
      return {
        index,
        message: {
          role: "assistant",
          content: content === "" && calls.length > 0 ? null : content,
          refusal: null,
          ...(calls.length > 0 ? { tool_calls: calls } : {}),
        },
        logprobs: body.logprobs === true ? { content: tokens.map(chatLogprob), refusal: null } : null,
        finish_reason: calls.length > 0 && reason === "stop" ? "tool_calls" : reason,
      };
    });
    return c.json({ ...envelope(CHAT, false), choices, usage: usageOf(done.map((d) => d.usage), body) });
  }

  async function wholeCompletion(c: Context, body: CompletionBody, generation: Generation, echoes: readonly string[]) {
    const done = await whole(generation, body.ignore_eos === true);
    const choices = done.map(({ index, text, tokens, reason }) => ({
      index,
      text: echoes[Math.floor(index / (body.n ?? 1))]! + text,
      logprobs: body.logprobs === undefined ? null : legacyLogprobs(tokens, 0),
      finish_reason: reason,
    }));
    return c.json({ ...envelope(COMPLETION, false), choices, usage: usageOf(done.map((d) => d.usage), body) });
  }

  /**
   * Streams all choices as they come. `begin`, `piece` and `end` make a choice's chunks; what a piece does not tell yet it is
   * given no more, but its tokens are given again.
   */
  function stream(
    body: CommonBody,
    generation: Generation,
    base: ReturnType<typeof envelope>,
    parts: {
      begin(index: number): object | undefined;
      piece(index: number, text: string, tokens: readonly TokenLogprobs[], last: boolean): object | undefined;
      end(index: number, reason: string): object;
      textOf?(event: TokenEvent): string;
    },
  ): Response {
    const includeUsage = body.stream_options?.include_usage === true;
    const extra = includeUsage ? { usage: null } : {};
    return eventStream(async (send) => {
      const chunk = (choice: object | undefined) => {
        if (choice !== undefined) send({ ...base, choices: [choice], ...extra });
      };
      try {
        const usages = await Promise.all(generation.choices.map(async ({ index, events }) => {
          chunk(parts.begin(index));
          let held: TokenLogprobs[] = [];
          const tell = (text: string, last: boolean) => {
            const piece = parts.piece(index, text, held, last);
            if (piece !== undefined) held = [];
            chunk(piece);
          };
          for await (const event of events) {
            if (event.type === "done") {
              tell("", true);
              chunk(parts.end(index, event.reason));
              return event.usage;
            }
            held.push(...logprobsOf(engine, event, body.ignore_eos === true));
            tell(parts.textOf?.(event) ?? event.text, false);
          }
          throw new Error("a generation ended without saying so");
        }));
        if (includeUsage) send({ ...base, choices: [], usage: usageOf(usages, body) });
        send("[DONE]");
      } catch (error) {
        generation.abort();
        const known = toApiError(error);
        if (known.status >= 500 && !(error instanceof DOMException)) (options.onError ?? console.error)(error);
        send(known.body);
      }
    }, generation.abort);
  }

  function streamChat(body: ChatBody, generation: Generation, opening: string): Response {
    const choice = (index: number, delta: object, logprobs: readonly TokenLogprobs[], reason: string | null) => ({
      index,
      delta,
      logprobs: body.logprobs === true && logprobs.length > 0
        ? { content: logprobs.map(chatLogprob), refusal: null }
        : null,
      finish_reason: reason,
    });
    const base = envelope(CHAT, true);
    const tools = toolsOf(body);
    if (tools.length === 0) {
      return stream(body, generation, base, {
        begin: (index) => choice(index, { role: "assistant", content: "" }, [], null),
        piece: (index, text, tokens, last) =>
          worthTelling(text, tokens, last) ? choice(index, { content: text }, tokens, null) : undefined,
        end: (index, reason) => choice(index, {}, [], reason),
      });
    }
    const parsers = generation.choices.map(() => {
      const parser = new ToolCallParser(tools.map((tool) => tool.function.name));
      parser.push(opening); // which ends within a call: nothing comes of it yet
      return parser;
    });
    const calls = generation.choices.map(() => 0);
    return stream(body, generation, base, {
      textOf: markedText,
      begin: (index) => choice(index, { role: "assistant", content: "" }, [], null),
      piece: (index, text, tokens, last) => {
        const parts = [parsers[index]!.push(text), ...(last ? [parsers[index]!.flush()] : [])];
        const content = parts.map((part) => part.text).join("");
        const made = parts.flatMap((part) => part.calls).map((call) => ({ index: calls[index]!++, ...apiCall(call) }));
        if (made.length === 0 && !worthTelling(content, tokens, last)) return undefined;
        const delta = {
          ...(content === "" && made.length > 0 ? {} : { content }),
          ...(made.length > 0 ? { tool_calls: made } : {}),
        };
        return choice(index, delta, tokens, null);
      },
      end: (index, reason) => choice(index, {}, [], calls[index]! > 0 && reason === "stop" ? "tool_calls" : reason),
    });
  }

  function streamCompletion(body: CompletionBody, generation: Generation, echoes: readonly string[]): Response {
    const offsets = new Map<number, number>();
    const choice = (index: number, text: string, tokens: readonly TokenLogprobs[], reason: string | null) => {
      const offset = offsets.get(index) ?? 0;
      offsets.set(index, offset + text.length);
      const logprobs = body.logprobs === undefined || tokens.length === 0 ? null : legacyLogprobs(tokens, offset);
      return { index, text, logprobs, finish_reason: reason };
    };
    return stream(body, generation, envelope(COMPLETION, true), {
      begin: (index) => {
        const echo = echoes[Math.floor(index / (body.n ?? 1))]!;
        return echo === "" ? undefined : choice(index, echo, [], null);
      },
      piece: (index, text, tokens, last) =>
        worthTelling(text, tokens, last) ? choice(index, text, tokens, null) : undefined,
      end: (index, reason) => choice(index, "", [], reason),
    });
  }

  function tokenString(id: number): { token: string; bytes: number[] } {
    const bytes = engine.model.tokenizer.tokenBytes(id);
    if (bytes.length === 0) return { token: engine.model.tokenizer.tokenText(id), bytes: [] };
    return { token: new TextDecoder().decode(bytes), bytes: [...bytes] };
  }

  function chatLogprob({ id, logprob, top }: TokenLogprobs) {
    return {
      ...tokenString(id),
      logprob,
      top_logprobs: top.map((other) => ({ ...tokenString(other.id), logprob: other.logprob })),
    };
  }

  function legacyLogprobs(tokens: readonly TokenLogprobs[], offset: number) {
    const strings = tokens.map(({ id }) => tokenString(id).token);
    return {
      tokens: strings,
      token_logprobs: tokens.map(({ logprob }) => logprob),
      top_logprobs: tokens.map(({ top }) => Object.fromEntries(top.map((t) => [tokenString(t.id).token, t.logprob]))),
      text_offset: strings.map((_, i) => offset + strings.slice(0, i).join("").length),
    };
  }

  return app;
}

type TokenEvent = GenerateEvent & { type: "token" };

/** Without text a chunk waits for more: a character or a stop string is incomplete. */
function worthTelling(text: string, tokens: readonly TokenLogprobs[], last: boolean): boolean {
  return text !== "" || (last && tokens.length > 0);
}

/** The tools that the model is offered. */
function toolsOf({ tools, tool_choice }: ChatBody): ChatTool[] {
  if (tools === undefined || tool_choice === "none") return [];
  return tools.map(({ type, function: { name, description, parameters } }) => ({
    type,
    function: {
      name,
      ...(description === undefined ? {} : { description }),
      ...(parameters === undefined ? {} : { parameters }),
    },
  }));
}

/** A call with an id of nine letters and digits, the only form that Mistral's templates take back. */
function apiCall({ name, arguments: text }: ToolCall) {
  const id = [...crypto.getRandomValues(new Uint8Array(9))].map((byte) => (byte % 36).toString(36)).join("");
  return { id, type: "function", function: { name, arguments: text } };
}

/** The conversation as tokens, through the model's template, and what of the answer they have already: a call's beginning. */
function chatPrompt(engine: Engine, body: ChatBody): { tokens: number[]; opening: string } {
  const { chatTemplate, tokenizer } = engine.model;
  const tools = toolsOf(body);
  const called = body.messages.some((m) => m.role === "tool" || (m.role === "assistant" && m.tool_calls !== undefined));
  if ((tools.length > 0 || called) && !chatTemplate.takesTools) {
    throw new ApiError(400, "tools are not supported: the model's chat template has no place for them", {
      param: "tools",
      code: "unsupported_parameter",
    });
  }
  const names = new Map<string, string>();
  const messages = body.messages.map((message): ChatMessage => {
    if (message.role === "assistant") {
      const calls = message.tool_calls?.map(({ id, ...call }) => {
        if (id !== undefined) names.set(id, call.function.name);
        return { ...(id === undefined ? {} : { id }), ...call };
      });
      return {
        role: "assistant",
        content: message.content ?? "",
        ...(calls === undefined || calls.length === 0 ? {} : { tool_calls: calls }),
      };
    }
    if (message.role === "tool") {
      const name = names.get(message.tool_call_id);
      return { ...message, ...(name === undefined ? {} : { name }) };
    }
    // OpenAI's newer name for system.
    return { role: message.role === "developer" ? "system" : message.role, content: message.content };
  });
  const opening = callOpening(engine, body, messages, tools);
  const tokens = tokenizer.encode(chatTemplate.render(messages, { tools }) + opening, { parseSpecial: true });
  // Templates often write BOS themselves.
  const { bosId } = tokenizer;
  const twice = bosId !== undefined && tokens[0] === bosId && tokens[1] === bosId;
  return { tokens: twice ? tokens.slice(1) : tokens, opening };
}

/** How an answer begins that must be a call. */
function callOpening(
  engine: Engine,
  { tool_choice: choice }: ChatBody,
  messages: readonly ChatMessage[],
  tools: readonly ChatTool[],
): string {
  if (choice === undefined || choice === "none" || choice === "auto") return "";
  const name = choice === "required" ? undefined : choice.function.name;
  const refuse = (message: string) =>
    new ApiError(400, message, { param: "tool_choice", code: "unsupported_parameter" });
  if (tools.length === 0) throw refuse("tool_choice asks for a call, but there are no tools");
  if (name !== undefined && !tools.some((tool) => tool.function.name === name)) {
    throw refuse(`tool_choice names ${JSON.stringify(name)}, which is none of the tools`);
  }
  const opening = engine.model.chatTemplate.callOpening(messages, { tools }, name);
  if (opening !== undefined) return opening;
  throw refuse(
    "the model's chat template does not write calls in a form that could be begun: only the tool choices none and auto are supported",
  );
}

function completionPrompts(engine: Engine, { prompt }: CompletionBody): number[][] {
  const { tokenizer } = engine.model;
  const encode = (text: string) => {
    const ids = tokenizer.encode(text);
    return ids.length === 0 && tokenizer.bosId !== undefined ? [tokenizer.bosId] : ids;
  };
  if (typeof prompt === "string") return [encode(prompt)];
  if (typeof prompt[0] === "number") return [prompt as number[]];
  return (prompt as (string | number[])[]).map((p) => typeof p === "string" ? encode(p) : p);
}

/** Prompts count once, however many choices they have. */
function usageOf(usages: readonly Usage[], body: CommonBody) {
  const n = body.n ?? 1;
  const prompt = usages.filter((_, i) => i % n === 0).reduce((sum, usage) => sum + usage.promptTokens, 0);
  const completion = usages.reduce((sum, usage) => sum + usage.completionTokens, 0);
  return { prompt_tokens: prompt, completion_tokens: completion, total_tokens: prompt + completion };
}

/** Headers under which the page may run its own script and style, and nothing else. */
function pageHeaders(page: string): Record<string, string> {
  const hash = (tag: string) =>
    [...page.matchAll(new RegExp(`<${tag}>(.*?)</${tag}>`, "gs"))]
      .map((match) => `'sha256-${createHash("sha256").update(match[1]!).digest("base64")}'`).join(" ");
  return {
    "content-security-policy": `default-src 'none'; script-src ${hash("script")}; style-src ${hash("style")}; ` +
      "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
  };
}
