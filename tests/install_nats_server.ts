/**
 * Sees to a nats-server for the tests: one on PATH will do, else it is built with the Go toolchain into `tests/.bin`, else it is
 * installed with apt (as root). Where nothing works it says so, and tests that need one report themselves as ignored; with
 * `CI=true` that is an error.
 *
 * @module
 */
import { findNatsServer } from "../bus/nats_server.ts";
import { repoPath } from "./data.ts";

const VERSION = "v2.15.2";
const folder = repoPath("tests", ".bin");

async function run(command: string, args: string[], env: Record<string, string> = {}): Promise<boolean> {
  try {
    const { success } = await new Deno.Command(command, { args, env, stdin: "null", stdout: "null" }).output();
    return success;
  } catch {
    return false; // there is no such program
  }
}

async function install(): Promise<void> {
  if (findNatsServer([folder]) !== undefined) return;
  const go = ["install", `github.com/nats-io/nats-server/v2@${VERSION}`];
  if (await run("go", go, { GOBIN: folder, GOFLAGS: "" })) return;
  if (Deno.uid() === 0) {
    const env = { DEBIAN_FRONTEND: "noninteractive" };
    await run("apt-get", ["update", "-qq"], env);
    await run("apt-get", ["install", "-y", "-qq", "--no-install-recommends", "nats-server"], env);
  }
}

await install();
const found = findNatsServer([folder]);
if (found !== undefined) {
  const { stdout } = await new Deno.Command(found, { args: ["--version"] }).output();
  console.log(`${new TextDecoder().decode(stdout).trim()}: ${found}`);
} else {
  const hint = "install it (Debian, Raspberry Pi OS: `sudo apt install nats-server`) or Go";
  console.error(
    `there is no nats-server and none can be installed here: cluster tests are ignored. To run them, ${hint}.`,
  );
  if (Deno.env.get("CI") === "true") Deno.exit(1);
}
