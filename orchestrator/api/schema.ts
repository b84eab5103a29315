import { z } from "zod";
import { MAX_STOP_STRINGS } from "../request.ts";
import { ApiError } from "./errors.ts";

const nullish = <T extends z.ZodType>(schema: T) => schema.nullish().transform((value) => value ?? undefined);
const tokenId = z.number().int().nonnegative();

const common = {
  model: nullish(z.string()),
  stream: nullish(z.boolean()),
  stream_options: nullish(z.object({ include_usage: nullish(z.boolean()) })),
  max_tokens: nullish(z.number().int().min(1)),
  temperature: nullish(z.number().min(0).max(100)),
  top_p: nullish(z.number().min(0).max(1)),
  n: nullish(z.number().int().min(1).max(32)),
  stop: nullish(z.union([z.string(), z.array(z.string()).max(MAX_STOP_STRINGS)])),
  seed: nullish(z.number().int()),
  presence_penalty: nullish(z.number().min(-2).max(2)),
  frequency_penalty: nullish(z.number().min(-2).max(2)),
  logit_bias: nullish(z.record(z.string().regex(/^\d+$/, "keys are token ids"), z.number().min(-100).max(100))),
  // Beyond OpenAI's.
  top_k: nullish(z.number().int().nonnegative()),
  min_p: nullish(z.number().min(0).max(1)),
  repeat_penalty: nullish(z.number().min(0.001).max(1000)),
  repetition_penalty: nullish(z.number().min(0.001).max(1000)),
  ignore_eos: nullish(z.boolean()),
};

const textPart = z.object({ type: z.literal("text", "only parts of type text are supported"), text: z.string() });

const content = z.union([
  z.string(),
  z.array(textPart).transform((parts) => parts.map((part) => part.text).join("")),
]);
const toolCall = z.object({
  id: nullish(z.string()),
  type: z.literal("function", "only calls of type function are supported"),
  function: z.object({ name: z.string().min(1), arguments: z.string() }).transform((call, context) => {
    try {
      return { name: call.name, arguments: JSON.parse(call.arguments) as unknown };
    } catch {
      context.addIssue({ code: "custom", path: ["arguments"], message: "the arguments are no JSON" });
      return z.NEVER;
    }
  }),
});
const message = z.discriminatedUnion("role", [
  z.object({ role: z.enum(["system", "developer", "user"]), content }),
  z.object({
    role: z.literal("assistant"),
    content: nullish(content),
    tool_calls: nullish(z.array(toolCall).max(128)),
  }).refine((m) => m.content !== undefined || (m.tool_calls ?? []).length > 0, {
    path: ["content"],
    message: "there is neither content nor a tool call",
  }),
  z.object({ role: z.literal("tool"), content, tool_call_id: z.string() }),
]);
const tool = z.object({
  type: z.literal("function", "only tools of type function are supported"),
  function: z.object({
    name: z.string().regex(/^[\w.-]{1,64}$/, "a name has up to 64 letters, digits, _, . and -"),
    description: nullish(z.string()),
    parameters: nullish(z.record(z.string(), z.unknown())),
  }),
});

/** The body of `POST /v1/chat/completions`; fields that are not known are ignored. */
export const chatSchema = z.object({
  ...common,
  messages: z.array(message).min(1),
  tools: nullish(z.array(tool).max(128)),
  tool_choice: nullish(z.union([
    z.enum(["none", "auto", "required"]),
    z.object({ type: z.literal("function"), function: z.object({ name: z.string() }) }),
  ], "tool choices are none, auto, required, and one function by its name")),
  parallel_tool_calls: nullish(z.literal(true, "parallel_tool_calls cannot be turned off")),
  max_completion_tokens: nullish(z.number().int().min(1)),
  logprobs: nullish(z.boolean()),
  top_logprobs: nullish(z.number().int().min(0).max(20)),
});
export type ChatBody = z.infer<typeof chatSchema>;

/** The body of `POST /v1/completions`. */
export const completionSchema = z.object({
  ...common,
  prompt: z.union([
    z.string(),
    z.array(z.string()).min(1).max(128),
    z.array(tokenId).min(1),
    z.array(z.array(tokenId).min(1)).min(1).max(128),
  ]),
  logprobs: nullish(z.number().int().min(0).max(20)),
  echo: nullish(z.boolean()),
});
export type CompletionBody = z.infer<typeof completionSchema>;

/** What both bodies share. */
export type CommonBody = Pick<CompletionBody, keyof typeof common>;

const empty = (value: unknown) => value === undefined || value === null || (Array.isArray(value) && value.length === 0);

/**
 * Refuses what would change the answer's meaning if it were ignored.
 *
 * @throws {ApiError} naming the parameter.
 */
export function refuseUnsupported(body: Record<string, unknown>): void {
  const refuse = (param: string, what = param) => {
    throw new ApiError(400, `${what} is not supported`, { param, code: "unsupported_parameter" });
  };
  for (const param of ["functions", "function_call", "audio", "prediction", "suffix", "web_search_options"]) {
    if (!empty(body[param])) refuse(param);
  }
  const format = body["response_format"];
  if (!empty(format) && (format as { type?: unknown }).type !== "text") {
    refuse("response_format", "a response_format but text");
  }
  const modalities = body["modalities"];
  if (Array.isArray(modalities) && modalities.some((m) => m !== "text")) refuse("modalities", "a modality but text");
  const bestOf = body["best_of"];
  if (!empty(bestOf) && bestOf !== (body["n"] ?? 1)) refuse("best_of", "best_of other than n");
}
