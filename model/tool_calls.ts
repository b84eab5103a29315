import type { Tokenizer } from "./tokenizer.ts";

/** A call that the model wrote. */
export interface ToolCall {
  readonly name: string;
  /** JSON, as OpenAI's API has it. */
  readonly arguments: string;
}

/** What is new of an answer: text for people, and calls. */
export interface ToolCallPiece {
  readonly text: string;
  readonly calls: readonly ToolCall[];
}

const OPEN = "<tool_call>";
const CLOSE = "</tool_call>";
const MISTRAL = "[TOOL_CALLS]";
const LLAMA = "<|python_tag|>";
/** Special tokens that structure calls, and so must not be left out of the text. */
const MARKS: ReadonlySet<string> = new Set([OPEN, CLOSE, MISTRAL, LLAMA, "[ARGS]", "[CALL_ID]"]);

/** What a token adds to the text that a {@linkcode ToolCallParser} wants, beyond what readers are shown. */
export function toolCallMark(tokenizer: Tokenizer, id: number): string {
  if (tokenizer.tokenBytes(id).length > 0) return "";
  const text = tokenizer.tokenText(id);
  return MARKS.has(text) ? text : "";
}

/**
 * Finds calls of tools in an answer that comes in pieces, in the forms that models are trained on:
 *
 * - Hermes, Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number, text before and between;
 * - Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` for each;
 * - Llama 3: an answer that is `{"name": …, "parameters": {…}}`, several with `;` between, perhaps behind `<|python_tag|>`.
 *
 * What looks like a call and is none stays text. White space around calls is dropped.
 */
export class ToolCallParser {
  readonly #tools: ReadonlySet<string>;
  #held = "";
  /** Behind which mark the held text stands; `{` for an answer that began as an object. */
  #within: typeof OPEN | typeof MISTRAL | typeof LLAMA | "{" | undefined;
  #begun = false;
  #behindCall = false;

  /** @param tools Names of the tools that there are. */
  constructor(tools: Iterable<string>) {
    this.#tools = new Set(tools);
  }

  push(piece: string): ToolCallPiece {
    this.#held += piece;
    let text = "";
    const calls: ToolCall[] = [];
    for (;;) {
      if (this.#within === OPEN) {
        const end = this.#held.indexOf(CLOSE);
        if (end < 0) break;
        const inner = this.#held.slice(0, end);
        this.#held = this.#held.slice(end + CLOSE.length);
        this.#within = undefined;
        const call = callOf(parseJson(inner));
        if (call === undefined) text += OPEN + inner + CLOSE;
        else calls.push(call);
        this.#begun = true;
        this.#behindCall = call !== undefined;
      } else if (this.#within !== undefined) break; // only the end of the answer ends it
      else {
        if (this.#behindCall) this.#held = this.#held.trimStart();
        if (this.#held !== "") this.#behindCall = false;
        const first = firstOf(this.#held, [OPEN, MISTRAL, LLAMA]);
        if (first === undefined) {
          if (!this.#begun && this.#held.trimStart().startsWith("{")) {
            this.#within = "{";
            break;
          }
          const ready = this.#held.length - heldBack(this.#held);
          text += this.#held.slice(0, ready);
          this.#held = this.#held.slice(ready);
          break;
        }
        text += this.#held.slice(0, first.at).trimEnd();
        this.#held = this.#held.slice(first.at + first.mark.length);
        this.#within = first.mark;
      }
      this.#begun ||= text !== "";
    }
    this.#begun ||= text !== "";
    return { text, calls };
  }

  /** Ends the answer. */
  flush(): ToolCallPiece {
    const [held, within] = [this.#held, this.#within];
    this.#held = "";
    this.#within = undefined;
    if (within === undefined) return { text: held.trimEnd(), calls: [] };
    const calls = within === OPEN
      ? [callOf(parseJson(held))] // the end of the answer stood for the closing mark
      : within === MISTRAL
      ? mistralCalls(held)
      : llamaCalls(held, this.#tools);
    if (calls.length > 0 && calls.every((call) => call !== undefined)) return { text: "", calls };
    return { text: (within === "{" ? "" : within) + held, calls: [] };
  }
}

function firstOf<M extends string>(text: string, marks: readonly M[]): { at: number; mark: M } | undefined {
  let first: { at: number; mark: M } | undefined;
  for (const mark of marks) {
    const at = text.indexOf(mark);
    if (at >= 0 && (first === undefined || at < first.at)) first = { at, mark };
  }
  return first;
}

/** How many characters at the end may be the beginning of a mark, or white space before one. */
function heldBack(text: string): number {
  let partial = 0;
  for (const mark of [OPEN, MISTRAL, LLAMA]) {
    for (let n = Math.min(mark.length - 1, text.length); n > partial; n--) {
      if (text.endsWith(mark.slice(0, n))) partial = n;
    }
  }
  const before = text.slice(0, text.length - partial);
  return text.length - before.trimEnd().length;
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function callOf(value: unknown): ToolCall | undefined {
  if (typeof value !== "object" || value === null) return undefined;
  const { name, arguments: given, parameters } = value as Record<string, unknown>;
  const args = given ?? parameters ?? {};
  if (typeof name !== "string" || name === "") return undefined;
  if (typeof args === "string") return { name, arguments: args };
  if (typeof args !== "object" || Array.isArray(args)) return undefined;
  return { name, arguments: JSON.stringify(args) };
}

function mistralCalls(text: string): (ToolCall | undefined)[] {
  const list = parseJson(text);
  if (Array.isArray(list)) return list.map(callOf);
  return text.split(MISTRAL).map((part) => {
    const match = /^\s*([^\s[{]+)\s*(?:\[CALL_ID\][^[]*)?(?:\[ARGS\])?\s*(\{.*\})\s*$/s.exec(part);
    return match === null ? undefined : callOf({ name: match[1], arguments: parseJson(match[2]!) ?? [] });
  });
}

function llamaCalls(text: string, tools: ReadonlySet<string>): (ToolCall | undefined)[] {
  const whole = parseJson(text);
  const values = whole !== undefined ? [whole].flat() : text.split(/;\s*(?=\{)/).map(parseJson);
  return values.map(callOf).map((call) => call !== undefined && tools.has(call.name) ? call : undefined);
}
