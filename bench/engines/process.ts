import { z } from "zod";
import { bandwidthSchema, engineInfoSchema, lines, logitsSchema, timesSchema } from "./engine.ts";
import type { EngineInfo, EngineRequest, LoadRequest, MeasureRequest } from "./engine.ts";

/** An engine's process failed, or says that it cannot do what it was asked. */
export class EngineError extends Error {
  override readonly name = "EngineError";
}

const errorSchema = z.strictObject({ error: z.string() });

/** How to start an engine's process. */
export interface EngineCommand {
  /** What to call it in errors. */
  readonly name: string;
  readonly command: string;
  readonly args: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  /** Cores that it may use; all when absent, or where the system has no `taskset`. */
  readonly cores?: number;
}

/** An engine in a process of its own. `await using` ends it. */
export class EngineProcess implements AsyncDisposable {
  readonly #name: string;
  readonly #child: Deno.ChildProcess;
  readonly #input: WritableStreamDefaultWriter<Uint8Array<ArrayBuffer>>;
  readonly #answers: AsyncGenerator<string>;

  private constructor(name: string, child: Deno.ChildProcess) {
    this.#name = name;
    this.#child = child;
    this.#input = child.stdin.getWriter();
    this.#answers = lines(child.stdout);
  }

  /** @throws {EngineError} when the command cannot be started. */
  static start({ name, command, args, env = {}, cores }: EngineCommand): EngineProcess {
    const pinned = cores !== undefined && hasTaskset();
    const [file, list] = pinned ? ["taskset", ["-c", `0-${cores - 1}`, command, ...args]] : [command, [...args]];
    try {
      const options = { args: list, env: { ...env }, stdin: "piped", stdout: "piped", stderr: "inherit" } as const;
      return new EngineProcess(name, new Deno.Command(file, options).spawn());
    } catch (cause) {
      throw new EngineError(`${name} cannot be started: ${file}`, { cause });
    }
  }

  async #ask<T>(request: EngineRequest, schema: z.ZodType<T>): Promise<T> {
    try {
      await this.#input.write(new TextEncoder().encode(`${JSON.stringify(request)}\n`));
    } catch (cause) {
      throw new EngineError(`${this.#name} has ended`, { cause });
    }
    const { value, done } = await this.#answers.next();
    if (done === true) {
      const { code, signal } = await this.#child.status;
      throw new EngineError(`${this.#name} ended at a ${request.type} with ${signal ?? `code ${code}`}`);
    }
    let answer: unknown;
    try {
      answer = JSON.parse(value);
    } catch (cause) {
      throw new EngineError(`${this.#name} answered no JSON: ${value.slice(0, 100)}`, { cause });
    }
    const refusal = errorSchema.safeParse(answer);
    if (refusal.success) throw new EngineError(`${this.#name}: ${refusal.data.error}`);
    const parsed = schema.safeParse(answer);
    if (!parsed.success) {
      throw new EngineError(`${this.#name} answered what no ${request.type} is answered`, { cause: parsed.error });
    }
    return parsed.data;
  }

  load(request: Omit<LoadRequest, "type">): Promise<EngineInfo> {
    return this.#ask({ type: "load", ...request }, engineInfoSchema);
  }

  /** Seconds of each timed step. */
  async measure(request: Omit<MeasureRequest, "type">): Promise<number[]> {
    return (await this.#ask({ type: "measure", ...request }, timesSchema)).seconds;
  }

  async logits(tokens: number[]): Promise<number[]> {
    return (await this.#ask({ type: "logits", tokens }, logitsSchema)).logits;
  }

  /** GB/s, or null. */
  async bandwidth(mebibytes: number): Promise<number | null> {
    return (await this.#ask({ type: "bandwidth", mebibytes }, bandwidthSchema)).bandwidth;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.#input.close(); // which ends it
    } catch { /* it has ended */ }
    await this.#answers.return(undefined);
    await this.#child.status;
  }
}

let taskset: boolean | undefined;

/** Whether the system can bind a process to cores. */
function hasTaskset(): boolean {
  if (taskset === undefined) {
    try {
      taskset =
        new Deno.Command("taskset", { args: ["--version"], stdout: "null", stderr: "null" }).outputSync().success;
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
      taskset = false;
    }
  }
  return taskset;
}
