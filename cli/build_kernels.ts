/**
 * The `build` task: builds the kernel library with cargo, and says how to get what is missing.
 *
 * @module
 */
import { fileURLToPath } from "node:url";

const MINIMUM_RUST = [1, 85] as const;

const HOW_RUST =
  "Install Rust from https://rustup.rs, or with `apt install rustc cargo` where that is 1.89 or newer, and open a new terminal.";
const HOW_LINKER =
  "Install one: `apt install gcc` (Debian, Raspberry Pi OS), `dnf install gcc` (Fedora), `xcode-select --install` (macOS).";

/** Something that building needs is missing; the message says how to get it. */
export class MissingToolError extends Error {
  override readonly name = "MissingToolError";
}

/** Runs a tool; `undefined` when there is none of that name. */
export type Run = (command: string, args: string[]) => { success: boolean; stdout: string } | undefined;

const run: Run = (command, args) => {
  try {
    const { success, stdout } = new Deno.Command(command, { args, stderr: "null" }).outputSync();
    return { success, stdout: new TextDecoder().decode(stdout) };
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
};

/** Checks for cargo, a Rust that is new enough, and a C linker. @throws {MissingToolError} */
export function checkTools(tool: Run = run): void {
  if (tool("cargo", ["--version"]) === undefined) {
    throw new MissingToolError(`cargo is missing: the kernels are written in Rust. ${HOW_RUST}`);
  }
  const rustc = tool("rustc", ["--version"]);
  const version = /^rustc (\d+)\.(\d+)/.exec(rustc?.stdout ?? "");
  if (version === null) throw new MissingToolError(`rustc does not say its version. ${HOW_RUST}`);
  const [major, minor] = [Number(version[1]), Number(version[2])];
  if (major < MINIMUM_RUST[0] || (major === MINIMUM_RUST[0] && minor < MINIMUM_RUST[1])) {
    throw new MissingToolError(
      `rustc is ${major}.${minor}; Lutra needs ${MINIMUM_RUST.join(".")} or newer. ${HOW_RUST}`,
    );
  }
  // What rustc links with on Unix; elsewhere cargo's own error is clear.
  if (Deno.build.os !== "windows" && tool("cc", ["--version"]) === undefined) {
    throw new MissingToolError(`cc, the C linker that Rust needs, is missing. ${HOW_LINKER}`);
  }
}

/** Builds the library in release mode; cargo does nothing when it is up to date. */
export function buildKernels(): boolean {
  const manifest = fileURLToPath(new URL("../kernels/Cargo.toml", import.meta.url));
  const args = ["build", "--release", "--locked", "--quiet", "--lib", "--manifest-path", manifest];
  return new Deno.Command("cargo", { args, stdout: "inherit", stderr: "inherit" }).outputSync().success;
}

if (import.meta.main) {
  try {
    checkTools();
  } catch (error) {
    if (!(error instanceof MissingToolError)) throw error;
    console.error(`error: ${error.message}`);
    Deno.exit(1);
  }
  if (!buildKernels()) {
    console.error("error: the kernel library could not be built; cargo says why above.");
    Deno.exit(1);
  }
}
