import { z } from "zod";

/**
 * An inference engine in a process of its own, asked by JSON lines: one request a line on its standard input, one answer a
 * line on its standard output. It computes only between a request and its answer, and sleeps otherwise, so that the engine
 * compared with it has the machine to itself.
 *
 * @module
 */

/** Opens a model, once per process. */
export const loadRequestSchema = z.strictObject({
  type: z.literal("load"),
  path: z.string().min(1),
  threads: z.number().int().positive(),
  /** Most sequences at the same time, and most tokens of each. */
  sequences: z.number().int().positive(),
  length: z.number().int().positive(),
});

/**
 * Times `steps` steps after `warmUp` untimed ones. A step feeds `tokens` tokens to each of `batch` sequences, which hold
 * `context` tokens before the first step, and computes the logits of each sequence's last token. Steps of more than one
 * token start from `context` again.
 */
export const measureRequestSchema = z.strictObject({
  type: z.literal("measure"),
  batch: z.number().int().positive(),
  tokens: z.number().int().positive(),
  context: z.number().int().nonnegative(),
  warmUp: z.number().int().nonnegative(),
  steps: z.number().int().positive(),
});

/** What an engine can be asked for. It ends when its standard input does. */
export const engineRequestSchema = z.discriminatedUnion("type", [
  loadRequestSchema,
  measureRequestSchema,
  /** The logits after the tokens, from an empty context. */
  z.strictObject({ type: z.literal("logits"), tokens: z.array(z.number().int().nonnegative()).min(1) }),
  /** Memory read bandwidth with the model's number of threads, over so much memory; null from an engine that cannot tell. */
  z.strictObject({ type: z.literal("bandwidth"), mebibytes: z.number().int().positive() }),
]);

export type LoadRequest = z.infer<typeof loadRequestSchema>;
export type MeasureRequest = z.infer<typeof measureRequestSchema>;
export type EngineRequest = z.infer<typeof engineRequestSchema>;

/** What an engine says of itself once a model is open. */
export const engineInfoSchema = z.strictObject({
  name: z.string(),
  /** Version, instruction set: what tells one build from another. */
  build: z.string(),
  /** Bytes of weights that a step reads, from an engine that knows. */
  bytesPerStep: z.number().positive().optional(),
});
export type EngineInfo = z.infer<typeof engineInfoSchema>;

export const timesSchema = z.strictObject({
  /** Seconds of each timed step. */
  seconds: z.array(z.number().positive()).min(1),
});
export const logitsSchema = z.strictObject({ logits: z.array(z.number()).min(1) });
/** In GB/s. */
export const bandwidthSchema = z.strictObject({ bandwidth: z.number().positive().nullable() });

/** An engine as its process implements it. */
export interface Engine {
  load(request: LoadRequest): Promise<EngineInfo> | EngineInfo;
  measure(request: MeasureRequest): Promise<number[]> | number[];
  logits(tokens: readonly number[]): Promise<number[]> | number[];
  bandwidth?(mebibytes: number): Promise<number>;
}

/** The token that sequence `seq` is fed at `position`. What it says does not matter for the speed. */
export function token(seq: number, position: number, vocab: number): number {
  return (7 + 31 * seq + 17 * position) % vocab;
}

/** Answers requests until the input ends. An error is an answer too: `{"error": "…"}`. */
export async function serve(engine: Engine): Promise<void> {
  const answer = async (request: EngineRequest): Promise<unknown> => {
    switch (request.type) {
      case "load":
        return await engine.load(request);
      case "measure":
        return { seconds: await engine.measure(request) };
      case "logits":
        return { logits: await engine.logits(request.tokens) };
      case "bandwidth":
        return { bandwidth: await engine.bandwidth?.(request.mebibytes) ?? null };
    }
  };
  for await (const line of lines(Deno.stdin.readable)) {
    let reply: unknown;
    try {
      reply = await answer(engineRequestSchema.parse(JSON.parse(line)));
    } catch (error) {
      reply = { error: error instanceof Error ? error.message : String(error) };
    }
    console.log(JSON.stringify(reply));
  }
}

/** The lines of a stream. */
export async function* lines(stream: ReadableStream<Uint8Array<ArrayBuffer>>): AsyncGenerator<string> {
  let rest = "";
  for await (const text of stream.pipeThrough(new TextDecoderStream())) {
    const parts = (rest + text).split("\n");
    rest = parts.pop()!;
    for (const part of parts) if (part !== "") yield part;
  }
  if (rest !== "") yield rest;
}
