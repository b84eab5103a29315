import type { Engine } from "../engine.ts";
import type { GenerateEvent, GenerateRequest, SamplingOptions, Usage } from "../request.ts";
import type { CommonBody } from "./schema.ts";

/** A choice under way. */
export interface Choice {
  readonly index: number;
  readonly events: AsyncIterableIterator<GenerateEvent>;
}

/** Everything asked for, generated side by side. */
export interface Generation {
  readonly choices: readonly Choice[];
  /** Ends what still runs. */
  abort(): void;
}

/** The sampling that a body asks for; OpenAI's defaults, which truncate nothing. */
function samplingOf(body: CommonBody, choice: number): Partial<SamplingOptions> {
  return {
    temperature: body.temperature ?? 1,
    topP: body.top_p ?? 1,
    topK: body.top_k ?? 0,
    minP: body.min_p ?? 0,
    repeatPenalty: body.repeat_penalty ?? body.repetition_penalty ?? 1,
    presencePenalty: body.presence_penalty ?? 0,
    frequencyPenalty: body.frequency_penalty ?? 0,
    penaltyLastN: -1,
    ...(body.seed === undefined ? {} : { seed: BigInt.asUintN(64, BigInt(body.seed) + BigInt(choice)) }),
    logitBias: new Map(Object.entries(body.logit_bias ?? {}).map(([id, bias]) => [Number(id), bias])),
  };
}

/**
 * Queues `n` choices for every prompt; choice `c` of prompt `p` has index `p · n + c`.
 *
 * @throws what {@linkcode Engine.generate} throws; then nothing stays queued.
 */
export function startGeneration(
  engine: Engine,
  body: CommonBody,
  prompts: readonly (readonly number[])[],
  options: { maxTokens: number | undefined; topLogprobs: number | undefined; signal: AbortSignal },
): Generation {
  const stop = new AbortController();
  const signal = AbortSignal.any([options.signal, stop.signal]);
  const abort = () => stop.abort(new DOMException("the client left", "AbortError"));
  const choices: Choice[] = [];
  try {
    for (const promptTokens of prompts) {
      for (let c = 0; c < (body.n ?? 1); c++) {
        const request: GenerateRequest = {
          promptTokens,
          maxTokens: options.maxTokens,
          sampling: samplingOf(body, c),
          stop: body.stop === undefined ? undefined : [body.stop].flat().filter((text) => text !== ""),
          topLogprobs: options.topLogprobs,
          ignoreEos: body.ignore_eos,
        };
        choices.push({ index: choices.length, events: engine.generate(request, { signal }) });
      }
    }
  } catch (error) {
    abort();
    // Their iterators end with the abort, which is nobody's business.
    for (const { events } of choices) events.next().catch(() => {});
    throw error;
  }
  return { choices, abort };
}

/** A token as log-probabilities tell it. */
export interface TokenLogprobs {
  readonly id: number;
  readonly logprob: number;
  readonly top: readonly { id: number; logprob: number }[];
}

/** A choice at its end. */
export interface FinishedChoice {
  readonly index: number;
  readonly text: string;
  readonly tokens: readonly TokenLogprobs[];
  readonly reason: "stop" | "length";
  readonly usage: Usage;
}

/** The log-probabilities in an event; none for an end-of-sequence token, which is no part of the text. */
export function logprobsOf(
  engine: Engine,
  event: GenerateEvent & { type: "token" },
  ignoreEos: boolean,
): TokenLogprobs[] {
  if (event.logprob === undefined || (!ignoreEos && engine.model.tokenizer.eosIds.has(event.id))) return [];
  return [{ id: event.id, logprob: event.logprob, top: event.top ?? [] }];
}

/** Waits for a choice's end. `textOf` gives an event's text. Default: what readers are shown. */
export async function finish(
  engine: Engine,
  choice: Choice,
  ignoreEos: boolean,
  textOf: (event: GenerateEvent & { type: "token" }) => string = (event) => event.text,
): Promise<FinishedChoice> {
  let text = "";
  const tokens: TokenLogprobs[] = [];
  for await (const event of choice.events) {
    if (event.type === "done") return { index: choice.index, text, tokens, reason: event.reason, usage: event.usage };
    text += textOf(event);
    tokens.push(...logprobsOf(engine, event, ignoreEos));
  }
  throw new Error("a generation ended without saying so");
}
