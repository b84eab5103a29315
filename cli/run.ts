import { createInterface } from "node:readline/promises";
import process from "node:process";
import type { Command } from "commander";
import type { ChatMessage } from "../model/mod.ts";
import type { Engine, GenerateRequest, Usage } from "../orchestrator/mod.ts";
import { LoadingLine } from "./loading.ts";
import { startLocalCluster } from "./local_cluster.ts";
import { clusterOptions, integer, samplingOptions, withClusterOptions, withSamplingOptions } from "./options.ts";
import type { LocalCluster } from "./local_cluster.ts";
import type { ClusterFlags, SamplingFlags } from "./options.ts";

interface RunFlags extends ClusterFlags, SamplingFlags {
  maxTokens?: number;
  stop?: string[];
  system?: string;
  raw?: boolean;
  json?: boolean;
}

/** Adds the command `run`. */
export function addRun(program: Command): void {
  const command = program.command("run")
    .description("answer one prompt, or hold a conversation")
    .argument("<model>", "a GGUF file, a folder with safetensors, or hf:org/repo[:file] that was pulled")
    .argument("[prompt]", "the prompt; `-` reads it from standard input; none begins a conversation")
    .option("--max-tokens <n>", "most tokens to generate", integer(1))
    .option("--stop <text...>", "end the answer before this text")
    .option("--system <text>", "what the model is told before the conversation")
    .option("--raw", "continue the prompt as it is, without the model's chat template")
    .option("--json", "print one JSON object instead of text");
  withSamplingOptions(withClusterOptions(command)).action(
    async (path: string, prompt: string | undefined, flags: RunFlags) => {
      const text = prompt === "-" ? (await new Response(Deno.stdin.readable).text()).trimEnd() : prompt;
      await using cluster = await load(path, flags);
      if (text === undefined) await converse(cluster.engine, flags);
      else await answerOnce(cluster.engine, text, flags);
    },
  );
}

async function load(path: string, flags: ClusterFlags): Promise<LocalCluster> {
  using line = new LoadingLine();
  return await startLocalCluster(path, { ...clusterOptions(flags), onLoading: line.show });
}

interface Answer {
  text: string;
  reason: string;
  usage: Usage;
  /** Seconds until the first token, and from there to the last. */
  prefillSeconds: number;
  decodeSeconds: number;
}

/** Generates an answer, handing out its text as it comes. */
async function answer(
  engine: Engine,
  promptTokens: readonly number[],
  flags: RunFlags,
  onText: (text: string) => void,
  signal?: AbortSignal,
): Promise<Answer> {
  const request: GenerateRequest = {
    promptTokens,
    maxTokens: flags.maxTokens,
    stop: flags.stop,
    sampling: samplingOptions(flags),
  };
  const start = performance.now();
  let first = start;
  const result: Answer = {
    text: "",
    reason: "cancelled",
    usage: { promptTokens: promptTokens.length, completionTokens: 0 },
    prefillSeconds: 0,
    decodeSeconds: 0,
  };
  for await (const event of engine.generate(request, signal === undefined ? {} : { signal })) {
    if (event.type === "done") {
      result.reason = event.reason;
      continue;
    }
    if (result.usage.completionTokens++ === 0) first = performance.now();
    result.text += event.text;
    onText(event.text);
  }
  result.prefillSeconds = (first - start) / 1000;
  result.decodeSeconds = (performance.now() - first) / 1000;
  return result;
}

function print(text: string): void {
  const bytes = new TextEncoder().encode(text);
  for (let at = 0; at < bytes.length;) at += Deno.stdout.writeSync(bytes.subarray(at));
}

/** Prompt and answer in numbers. */
function summary({ usage, prefillSeconds, decodeSeconds }: Answer): string {
  const { promptTokens, completionTokens } = usage;
  const rate = (tokens: number, seconds: number) => seconds > 0 ? `${(tokens / seconds).toFixed(1)} tok/s` : "at once";
  return `prompt ${promptTokens} tokens (${rate(promptTokens, prefillSeconds)}), ` +
    `answer ${completionTokens} tokens (${rate(completionTokens - 1, decodeSeconds)})`;
}

/** The prompt's tokens: through the chat template where the model brings one. */
function promptOf(engine: Engine, text: string, flags: RunFlags): { tokens: number[]; raw: boolean } {
  const { chatTemplate, tokenizer } = engine.model;
  const raw = flags.raw === true || (chatTemplate.isFallback && flags.system === undefined);
  return {
    tokens: raw ? tokenizer.encode(text) : encodeChat(engine, [...systemOf(flags), { role: "user", content: text }]),
    raw,
  };
}

function systemOf({ system }: RunFlags): ChatMessage[] {
  return system === undefined ? [] : [{ role: "system", content: system }];
}

function encodeChat(engine: Engine, messages: readonly ChatMessage[]): number[] {
  const { chatTemplate, tokenizer } = engine.model;
  const tokens = tokenizer.encode(chatTemplate.render(messages), { parseSpecial: true });
  // Templates often write BOS themselves.
  const { bosId } = tokenizer;
  return bosId !== undefined && tokens[0] === bosId && tokens[1] === bosId ? tokens.slice(1) : tokens;
}

/** How a conversation is written for a model without chat template. */
export const FALLBACK_TURNS = "turns are written as `User: …` and `Assistant: …` lines";

async function answerOnce(engine: Engine, text: string, flags: RunFlags): Promise<void> {
  const { tokens, raw } = promptOf(engine, text, flags);
  if (engine.model.chatTemplate.isFallback && flags.raw !== true) {
    console.error(`warning: the model has no chat template; ${raw ? "it continues the text" : FALLBACK_TURNS}`);
  }
  if (flags.json === true) {
    const result = await answer(engine, tokens, flags, () => {});
    console.log(JSON.stringify({ model: engine.model.id, prompt: text, ...result }));
    return;
  }
  if (raw) print(text); // a continuation reads best behind its beginning
  const result = await answer(engine, tokens, flags, print);
  print("\n");
  console.error(summary(result));
}

/** Room that a conversation leaves for the next answer, as a share of the context. */
const ANSWER_SHARE = 0.25;

async function converse(engine: Engine, flags: RunFlags): Promise<void> {
  if (engine.model.chatTemplate.isFallback) {
    console.error(
      "note: this model has no chat template; it is a text completion model, so do not expect much of a talk.",
    );
  }
  console.error(`${engine.model.id}: type a message. Ctrl-C stops an answer, Ctrl-D or /exit ends.`);
  const history: ChatMessage[] = systemOf(flags);
  const stop = engine.model.chatTemplate.isFallback ? [...(flags.stop ?? []), "\nUser:"] : flags.stop;
  const turnFlags: RunFlags = { ...flags, ...(stop === undefined ? {} : { stop }) };
  const lines = createInterface({ input: process.stdin, output: process.stderr, terminal: Deno.stdin.isTerminal() });
  let current: AbortController | undefined;
  lines.on("SIGINT", () => {
    if (current === undefined) lines.close();
    else current.abort();
  });
  let open = true; // piped input ends before the last answer does
  lines.on("close", () => open = false);
  lines.setPrompt("> ");
  lines.prompt();
  for await (const line of lines) {
    const text = line.trim();
    if (text === "/exit") break;
    if (text !== "") {
      history.push({ role: "user", content: text });
      let tokens = encodeChat(engine, history);
      const first = systemOf(flags).length;
      while (tokens.length > engine.contextLength * (1 - ANSWER_SHARE) && history.length > first + 1) {
        history.splice(first, 2);
        console.error("note: the conversation is too long; its oldest turn is forgotten.");
        tokens = encodeChat(engine, history);
      }
      current = new AbortController();
      let shown = "";
      try {
        const result = await answer(engine, tokens, turnFlags, (piece) => {
          shown += piece;
          print(piece);
        }, current.signal);
        print("\n");
        console.error(summary(result));
      } catch (error) {
        if (!current.signal.aborted) console.error(`\nerror: ${(error as Error).message}`);
        else print(" …\n");
      }
      history.push({ role: "assistant", content: shown });
      current = undefined;
    }
    if (open) lines.prompt();
  }
  lines.close();
}
