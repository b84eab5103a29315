/**
 * The command line: commands, their options, and how results and errors look. Here the rooms are put together; everything
 * else lives in them.
 *
 * @module
 */
import { Command, CommanderError, InvalidArgumentError } from "commander";
import { existsSync, readdirSync } from "node:fs";
import { basename, dirname } from "node:path";
import { BusError, LUTRA_VERSION } from "../bus/mod.ts";
import { GgufError, ModelError } from "../model/mod.ts";
import { OrchestratorError } from "../orchestrator/mod.ts";
import { WorkerError } from "../worker/mod.ts";
import { addBench } from "./bench.ts";
import { addDoctor } from "./doctor.ts";
import { HubError } from "./hub/errors.ts";
import { addInspect } from "./inspect.ts";
import { addPlan } from "./plan.ts";
import { addPull } from "./pull.ts";
import { addRun } from "./run.ts";
import { addServe } from "./serve.ts";
import { addStatus } from "./status.ts";
import { addTune } from "./tune.ts";
import { addWorker } from "./worker.ts";

/** The command line's grammar. */
export function createProgram(): Command {
  const program = new Command("lutra")
    .description("Run a language model on the boards you own.")
    .version(LUTRA_VERSION)
    .option("--debug", "show where an error came from")
    .showHelpAfterError("(--help explains)")
    .exitOverride();
  addRun(program);
  addServe(program);
  addWorker(program);
  addStatus(program);
  addDoctor(program);
  addPlan(program);
  addPull(program);
  addInspect(program);
  addBench(program);
  addTune(program);
  for (const command of program.commands) command.exitOverride().showHelpAfterError("(--help explains)");
  return program;
}

/**
 * Runs a command.
 *
 * @returns The exit code: 0, 1 for a failure, 2 for a wrong use.
 */
export async function main(args: readonly string[]): Promise<number> {
  const program = createProgram();
  try {
    await program.parseAsync([...args], { from: "user" });
    return 0;
  } catch (error) {
    if (error instanceof InvalidArgumentError) {
      console.error(`error: ${error.message}`); // of a command that has begun; commander tells those before
      return 2;
    }
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2; // commander has said why
    console.error(`error: ${explain(error, program.commands.flatMap((command) => command.processedArgs)[0])}`);
    if (program.opts()["debug"] === true) console.error(error);
    return 1;
  }
}

/** An error in one sentence that says what to do. */
function explain(error: unknown, path: unknown): string {
  if (!(error instanceof Error)) return String(error);
  if (error instanceof Deno.errors.NotFound && typeof path === "string" && !existsSync(path)) {
    const beside = modelsBeside(path);
    const hint = beside.length === 0 ? "" : ` There ${beside.length === 1 ? "is" : "are"} ${beside.join(", ")}.`;
    return `there is no file ${path}.${hint}`;
  }
  if (error instanceof GgufError && error.field === "magic") {
    return `${path} is no GGUF file. Lutra runs GGUF, and folders with safetensors: name the folder.`;
  }
  if (error instanceof Deno.errors.NotCapable) {
    return `${
      error.message.replace(/, run again with.*$/s, "")
    }: run with -P=run, -P=serve to serve or -P=pull to pull (see README).`;
  }
  if (error instanceof Deno.errors.AddrInUse) return "the port is in use: choose another with --port.";
  const known = [ModelError, OrchestratorError, WorkerError, BusError, HubError];
  if (known.some((type) => error instanceof type)) return error.message;
  return `${error.message} (--debug shows more)`;
}

function modelsBeside(path: string): string[] {
  try {
    return readdirSync(dirname(path)).filter((name) => name.endsWith(".gguf") && name !== basename(path)).slice(0, 5);
  } catch {
    return [];
  }
}
