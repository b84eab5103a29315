import { Environment, Interpreter, Template } from "@huggingface/jinja";
import { ChatTemplateError } from "./errors.ts";

/** One turn of a conversation. */
export interface ChatMessage {
  readonly role: string;
  readonly content: string;
}

/** Options of {@linkcode ChatTemplate.render}. */
export interface RenderOptions {
  /** End with what opens the assistant's turn. @default {true} */
  addGenerationPrompt?: boolean;
}

const MAX_TEMPLATE_CHARACTERS = 1 << 18;
/** Most characters of any string that a template makes. */
const MAX_OUTPUT_CHARACTERS = 1 << 22;
/** Most expressions and statements that a rendering evaluates: far beyond any real conversation, a second or two of work. */
const MAX_STEPS = 1 << 22;
/** Most elements of a template's `range()`. */
const MAX_RANGE = 1 << 16;
/** Used for models that bring no template: plain, so that base models can go on with it. */
const FALLBACK =
  "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}";

/** Runs templates that come with model files, which nobody has looked at: it counts steps and measures strings. */
class BoundedInterpreter extends Interpreter {
  #steps = 0;

  override evaluate(...args: Parameters<Interpreter["evaluate"]>): ReturnType<Interpreter["evaluate"]> {
    if (++this.#steps > MAX_STEPS) throw new ChatTemplateError(`it takes more than ${MAX_STEPS} steps`);
    const result = super.evaluate(...args);
    if (typeof result?.value === "string" && result.value.length > MAX_OUTPUT_CHARACTERS) {
      throw new ChatTemplateError(`it writes more than ${MAX_OUTPUT_CHARACTERS} characters`);
    }
    return result;
  }
}

/** Jinja's `range`, of bounded length. */
function range(start: number, stop?: number, step = 1): number[] {
  const [from, to] = stop === undefined ? [0, start] : [start, stop];
  const count = Math.max(0, Math.ceil((to - from) / step));
  if (!(count <= MAX_RANGE)) throw new ChatTemplateError(`range() has ${count} elements; ${MAX_RANGE} may be`);
  return Array.from({ length: count }, (_, i) => from + i * step);
}

/** Turns a conversation into the text that the model was trained on. */
export class ChatTemplate {
  /** Whether the model brought no template, and a plain one is used. */
  readonly isFallback: boolean;
  readonly #template: Template;
  readonly #tokens: { readonly bos_token: string; readonly eos_token: string };

  /**
   * @param source Jinja; `undefined` uses a plain template.
   * @throws {ChatTemplateError} when it is malformed.
   */
  constructor(source: string | undefined, tokens: { bos?: string | undefined; eos?: string | undefined } = {}) {
    this.isFallback = source === undefined;
    if ((source ?? "").length > MAX_TEMPLATE_CHARACTERS) {
      throw new ChatTemplateError(
        `the chat template has ${source!.length} characters; ${MAX_TEMPLATE_CHARACTERS} may be`,
      );
    }
    this.#tokens = { bos_token: tokens.bos ?? "", eos_token: tokens.eos ?? "" };
    try {
      this.#template = new Template(source ?? FALLBACK);
    } catch (cause) {
      throw new ChatTemplateError(`the model's chat template is malformed: ${(cause as Error).message}`, { cause });
    }
  }

  /** @throws {ChatTemplateError} when the template fails or refuses the conversation. */
  render(messages: readonly ChatMessage[], options: RenderOptions = {}): string {
    let text: string;
    try {
      const environment = new Environment();
      const globals: Record<string, unknown> = {
        ...{ true: true, True: true, false: false, False: false, none: null, None: null },
        ...this.#tokens,
        range,
        raise_exception: (message: string) => {
          throw new ChatTemplateError(message);
        },
        strftime_now: strftime,
        messages: messages.map((message) => ({ ...message })),
        add_generation_prompt: options.addGenerationPrompt ?? true,
      };
      for (const [name, value] of Object.entries(globals)) environment.set(name, value);
      text = String(new BoundedInterpreter(environment).run(this.#template.parsed).value);
    } catch (cause) {
      throw new ChatTemplateError(`the model's chat template failed: ${(cause as Error).message}`, { cause });
    }
    return text;
  }
}

/** The fields of strftime that templates use. */
function strftime(format: string): string {
  const now = new Date();
  const two = (n: number) => String(n).padStart(2, "0");
  const name = (options: Intl.DateTimeFormatOptions) => now.toLocaleDateString("en-US", options);
  const fields: Readonly<Record<string, string>> = {
    Y: String(now.getFullYear()),
    m: two(now.getMonth() + 1),
    d: two(now.getDate()),
    H: two(now.getHours()),
    M: two(now.getMinutes()),
    S: two(now.getSeconds()),
    B: name({ month: "long" }),
    b: name({ month: "short" }),
    A: name({ weekday: "long" }),
    a: name({ weekday: "short" }),
    "%": "%",
  };
  return format.replace(/%([YmdHMSBbAa%])/g, (_, field: string) => fields[field]!);
}
