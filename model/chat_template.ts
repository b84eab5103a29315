import { Template } from "@huggingface/jinja";
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
const MAX_OUTPUT_CHARACTERS = 1 << 24;
/** Used for models that bring no template: plain, so that base models can go on with it. */
const FALLBACK =
  "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}";

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
      text = this.#template.render({
        ...this.#tokens,
        messages: messages.map((message) => ({ ...message })),
        add_generation_prompt: options.addGenerationPrompt ?? true,
        raise_exception: (message: string) => {
          throw new ChatTemplateError(message);
        },
        strftime_now: strftime,
      });
    } catch (cause) {
      throw new ChatTemplateError(`the model's chat template failed: ${(cause as Error).message}`, { cause });
    }
    if (text.length > MAX_OUTPUT_CHARACTERS) throw new ChatTemplateError("the chat template's output is too long");
    return text;
  }
}

/** The few fields of strftime that templates use. */
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
