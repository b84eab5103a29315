import { readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { splitNames } from "../../model/mod.ts";
import { HubError } from "./errors.ts";

/** A model on a hub: `hf:org/repo[@revision][:file]`. */
export interface HubReference {
  readonly repo: string;
  /** A branch, tag or commit. */
  readonly revision: string;
  /** A path in the repository; none: its only GGUF file, or its safetensors. */
  readonly file?: string;
}

/** The weights of a folder with safetensors. */
export const FOLDER_WEIGHTS = "model.safetensors";
/** Where they are in several files: which tensor is in which. */
export const FOLDER_INDEX = `${FOLDER_WEIGHTS}.index.json`;

/** Whether a command line's model is one on a hub. */
export function isHubReference(text: string): boolean {
  return text.startsWith("hf:");
}

/** @throws {HubError} when it is malformed. */
export function parseReference(text: string): HubReference {
  const match = /^hf:([\w.-]+\/[\w.-]+)(?:@([\w./-]+))?(?::(.+))?$/.exec(text);
  const [, repo, revision = "main", file] = match ?? [];
  const hostile = [repo, revision, file].some((part) => part?.split(/[/\\]/).some((name) => /^\.*$/.test(name)));
  // deno-lint-ignore no-control-regex
  if (repo === undefined || hostile || /[\x00-\x1f\\?#%]/.test(file ?? "")) {
    throw new HubError(`${JSON.stringify(text)} is not of the form hf:org/repo[@revision][:file]`);
  }
  return { repo, revision, ...(file === undefined ? {} : { file }) };
}

/** How a reference is written. */
export function referenceText({ repo, revision, file }: HubReference): string {
  return `hf:${repo}${revision === "main" ? "" : `@${revision}`}${file === undefined ? "" : `:${file}`}`;
}

/** The folder for what can be fetched again; the kernel library finds the same one (`kernels/src/cache.rs`). */
export function cacheFolder(env: (name: string) => string | undefined = (name) => Deno.env.get(name)): string {
  const absolute = (name: string) => {
    const path = env(name);
    return path !== undefined && /^([/\\]|[A-Za-z]:)/.test(path) ? path : undefined;
  };
  const own = env("LUTRA_CACHE");
  if (own !== undefined && own !== "") return own;
  const home = absolute("HOME");
  const user = Deno.build.os === "windows"
    ? absolute("LOCALAPPDATA")
    : Deno.build.os === "darwin"
    ? home && join(home, "Library/Caches")
    : absolute("XDG_CACHE_HOME") ?? (home && join(home, ".cache"));
  if (user === undefined) throw new HubError("there is no folder for models: set LUTRA_CACHE to one");
  return join(user, "lutra");
}

/** As {@linkcode cacheFolder}; `undefined`, and the reason shown, where there is none. */
export function cacheFolderIfAny(): string | undefined {
  try {
    return cacheFolder();
  } catch (error) {
    if (!(error instanceof HubError)) throw error;
    console.error(`no weights travel over the bus, devices must have the file: ${error.message}`);
    return undefined;
  }
}

/** Where a repository's files are kept. */
export function repoFolder(reference: HubReference, cache: string): string {
  return join(cache, "models", reference.repo.replace("/", "--"), reference.revision.replaceAll("/", "--"));
}

/**
 * The path of a command line's model: itself, or the file or folder that `pull` has fetched for a hub's.
 *
 * @throws {HubError} when it has not been fetched.
 */
export function modelPath(text: string, cache: () => string = cacheFolder): string {
  if (!isHubReference(text)) return text;
  const reference = parseReference(text);
  const folder = repoFolder(reference, cache());
  const files = reference.file === undefined ? ggufFiles(folder) : [reference.file];
  if (files.length > 1) {
    throw new HubError(
      `${text} has several files here: ${files.map((file) => referenceText({ ...reference, file })).join(", ")}`,
    );
  }
  const isFolder = [FOLDER_WEIGHTS, FOLDER_INDEX].some((name) => isFile(join(folder, name)));
  if (reference.file === undefined && files.length === 0 && isFolder) return folder;
  const path = files[0] === undefined ? undefined : join(folder, splitNames(files[0])?.[0] ?? files[0]);
  if (path === undefined || !isFile(path)) {
    throw new HubError(`${text} is not here yet: fetch it with \`pull ${text}\` first`);
  }
  return path;
}

function isFile(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isFile() === true;
}

/** Whether a GGUF is whole, or the first file of a split one. */
export function isFirst(file: string): boolean {
  return (splitNames(file)?.[0] ?? file) === file;
}

function ggufFiles(folder: string): string[] {
  try {
    const names = readdirSync(folder, { recursive: true, encoding: "utf8" });
    return names.filter((name) => name.endsWith(".gguf") && isFirst(name)).sort();
  } catch {
    return [];
  }
}
