import { MAX_TOP_LOGPROBS } from "../bus/mod.ts";
import { ContextLengthError, RequestError } from "./errors.ts";

/** How tokens are chosen. */
export interface SamplingOptions {
  /** Divides the logits; 0 takes the most probable token. */
  temperature: number;
  /** Keep so many of the most probable tokens; 0 keeps all. */
  topK: number;
  /** Keep the most probable tokens up to this cumulative probability; 1 keeps all. */
  topP: number;
  /** Drop tokens less probable than this share of the most probable one; 0 keeps all. */
  minP: number;
  /** Divides (multiplies, if negative) the logits of tokens seen, prompt included; 1 is none. */
  repeatPenalty: number;
  /** Subtracted from the logits of tokens generated before. */
  presencePenalty: number;
  /** Subtracted as often as the token was generated before. */
  frequencyPenalty: number;
  /** How many of the last tokens the penalties look at; -1 is all, 0 none. */
  penaltyLastN: number;
  /** All the randomness there is: the same seed gives the same answer, whatever else runs. 64 bits. */
  seed: bigint;
  /** Added to the logits of these token ids. At most {@linkcode MAX_LOGIT_BIASES}. */
  logitBias: ReadonlyMap<number, number>;
}

/** What a request that names no sampling options gets, except that its seed is drawn at random. */
export const DEFAULT_SAMPLING: Readonly<SamplingOptions> = Object.freeze({
  temperature: 0.8,
  topK: 40,
  topP: 0.95,
  minP: 0.05,
  repeatPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  penaltyLastN: 64,
  seed: 0n,
  logitBias: new Map<number, number>(),
});

/** Most entries of {@linkcode SamplingOptions.logitBias}. */
export const MAX_LOGIT_BIASES = 1024;
/** Most stop strings of a request, and most characters of one. */
export const MAX_STOP_STRINGS = 64;
const MAX_STOP_LENGTH = 1024;

/** A request for a continuation. */
export interface GenerateRequest {
  /** The prompt; at least one token and at most the context length less one. */
  promptTokens: readonly number[];
  /** Most tokens to generate. Default, and at most: up to the context's end. */
  maxTokens?: number | undefined;
  /** Departures from {@linkcode DEFAULT_SAMPLING}; the seed is random unless given. */
  sampling?: Partial<SamplingOptions> | undefined;
  /** Strings that end the answer; neither they nor the start of one are ever part of its text. */
  stop?: readonly string[] | undefined;
  /** Report the log-probability of every token, with those of so many alternatives (0 to 20). */
  topLogprobs?: number | undefined;
  /** Go on after the model's end-of-sequence tokens. */
  ignoreEos?: boolean | undefined;
}

/** Tokens counted. */
export interface Usage {
  promptTokens: number;
  /** Generated tokens, an end-of-sequence token included. */
  completionTokens: number;
}

/** What {@linkcode Engine.generate} yields. The texts of all tokens, joined, are the answer. */
export type GenerateEvent =
  | {
    type: "token";
    /** Every generated token has one event, the end-of-sequence token too (its text is what was held back, if anything). */
    id: number;
    /** Complete characters only; empty while a character or a possible stop string is incomplete. */
    text: string;
    /** Natural logarithm of its probability before temperature and truncation; when asked for. */
    logprob?: number;
    /** The most probable tokens, most probable first; when asked for. */
    top?: { id: number; logprob: number }[];
  }
  | {
    /** The last event. */
    type: "done";
    /** `stop`: an end-of-sequence token or a stop string; `length`: `maxTokens` or the context's end. */
    reason: "stop" | "length";
    /** The stop string found. */
    stopSequence?: string;
    usage: Usage;
  };

/** A request that was checked and completed. */
export interface CheckedRequest {
  readonly promptTokens: readonly number[];
  readonly maxTokens: number;
  readonly sampling: Readonly<SamplingOptions>;
  readonly stop: readonly string[];
  readonly topLogprobs: number | undefined;
  readonly ignoreEos: boolean;
}

/** Bounds of what a request may ask for. */
export interface RequestLimits {
  readonly vocab: number;
  readonly contextLength: number;
}

/**
 * Checks every field and fills in defaults.
 *
 * @throws {ContextLengthError} when the prompt leaves no room.
 * @throws {RequestError} naming the field.
 */
export function checkRequest(request: GenerateRequest, limits: RequestLimits): CheckedRequest {
  const promptTokens = checkTokens(request.promptTokens, limits.vocab);
  if (promptTokens.length > limits.contextLength - 1) {
    throw new ContextLengthError(promptTokens.length, limits.contextLength);
  }
  const room = limits.contextLength - promptTokens.length;
  const maxTokens = request.maxTokens ?? room;
  integer("maxTokens", maxTokens, 1, Number.MAX_SAFE_INTEGER);
  const { topLogprobs, stop = [] } = request;
  if (topLogprobs !== undefined) integer("topLogprobs", topLogprobs, 0, MAX_TOP_LOGPROBS);
  if (stop.length > MAX_STOP_STRINGS) {
    throw new RequestError(`stop has ${stop.length} strings; ${MAX_STOP_STRINGS} may be`);
  }
  for (const text of stop) {
    if (text.length === 0 || text.length > MAX_STOP_LENGTH) {
      throw new RequestError(`a stop string has ${text.length} characters; 1 to ${MAX_STOP_LENGTH} may be`);
    }
  }
  return {
    promptTokens,
    maxTokens: Math.min(maxTokens, room),
    sampling: checkSampling(request.sampling ?? {}, limits.vocab),
    stop: [...stop],
    topLogprobs,
    ignoreEos: request.ignoreEos ?? false,
  };
}

/** A copy of `tokens`. Throws {@linkcode RequestError} when there are none or one is outside the vocabulary. */
export function checkTokens(tokens: readonly number[], vocab: number): number[] {
  if (tokens.length === 0) throw new RequestError("the prompt has no tokens");
  for (let i = 0; i < tokens.length; i++) {
    const id = tokens[i]!;
    if (!Number.isInteger(id) || id < 0 || id >= vocab) {
      throw new RequestError(`prompt token ${i} is ${id}; the vocabulary has ids 0 to ${vocab - 1}`);
    }
  }
  return [...tokens];
}

function checkSampling(options: Partial<SamplingOptions>, vocab: number): SamplingOptions {
  const defined = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
  const sampling: SamplingOptions = { ...DEFAULT_SAMPLING, seed: randomSeed(), ...defined };
  finite("temperature", sampling.temperature, 0, 1e6);
  integer("topK", sampling.topK, 0, 0xffff_ffff);
  finite("topP", sampling.topP, 0, 1);
  finite("minP", sampling.minP, 0, 1);
  finite("repeatPenalty", sampling.repeatPenalty, 1e-3, 1e3);
  finite("presencePenalty", sampling.presencePenalty, -1e3, 1e3);
  finite("frequencyPenalty", sampling.frequencyPenalty, -1e3, 1e3);
  integer("penaltyLastN", sampling.penaltyLastN, -1, 0x7fff_ffff);
  if (typeof sampling.seed !== "bigint") throw new RequestError("seed is no bigint");
  sampling.seed = BigInt.asUintN(64, sampling.seed);
  if (sampling.logitBias.size > MAX_LOGIT_BIASES) {
    throw new RequestError(`logitBias has ${sampling.logitBias.size} entries; ${MAX_LOGIT_BIASES} may be`);
  }
  for (const [id, bias] of sampling.logitBias) {
    integer("a token id in logitBias", id, 0, vocab - 1);
    finite(`logitBias of token ${id}`, bias, -1e6, 1e6);
  }
  sampling.logitBias = new Map(sampling.logitBias);
  return sampling;
}

function randomSeed(): bigint {
  return crypto.getRandomValues(new BigUint64Array(1))[0]!;
}

function finite(field: string, value: number, min: number, max: number): void {
  if (!(value >= min && value <= max)) throw new RequestError(`${field} is ${value}, not ${min} to ${max}`);
}

function integer(field: string, value: number, min: number, max: number): void {
  if (!Number.isInteger(value)) throw new RequestError(`${field} is ${value}, no integer`);
  finite(field, value, min, max);
}
