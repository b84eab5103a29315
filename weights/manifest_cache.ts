import { createHash } from "node:crypto";
import { readFile, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import { identityOf, replaceFile } from "./chunk_files.ts";
import { hashFiles, Manifest } from "./manifest.ts";

/** Where a manifest's hashes are kept. */
function pathOf(cache: string, key: string): string {
  return join(cache, "manifests", key);
}

/** The manifest of this root, if it is kept: what is damaged has another root, and is not. */
export async function keptManifest(
  cache: string,
  { root, files }: Pick<Manifest, "root" | "files">,
): Promise<Manifest | undefined> {
  try {
    const manifest = new Manifest(files, Uint8Array.from(await readFile(pathOf(cache, root))));
    return manifest.root === root ? manifest : undefined;
  } catch {
    return undefined; // nothing is lost but time
  }
}

/** Keeps a manifest. */
export async function keepManifest(cache: string, { root, hashes }: Manifest): Promise<void> {
  await replaceFile(pathOf(cache, root), hashes);
}

/**
 * The manifest of a model's files on this device: hashed once, and again when one is another.
 *
 * @param onProgress Told how much is hashed, 0 to 1.
 * @throws {WeightsError} when a file cannot be read.
 */
export async function manifestOf(
  paths: readonly string[],
  cache: string,
  { onProgress, log = console.warn }: { onProgress?: (fraction: number) => void; log?: (message: string) => void } = {},
): Promise<Manifest> {
  const identity = await identityOf(paths);
  const names = paths.map((path) => resolve(path));
  const key = pathOf(cache, `of-${createHash("sha256").update(JSON.stringify([identity, names])).digest("hex")}`);
  const root = await readFile(key, "utf8").catch(() => "");
  if (/^[0-9a-f]{64}$/.test(root)) {
    const files = (await Promise.all(paths.map((path) => stat(path)))).map(({ size }) => size);
    const known = await keptManifest(cache, { root, files });
    if (known !== undefined) return known;
  }
  const manifest = await hashFiles(paths, onProgress);
  try {
    await keepManifest(cache, manifest);
    if (await identityOf(paths) === identity) await replaceFile(key, manifest.root);
  } catch (error) {
    log(`the hashes of ${names.join(", ")} are not kept for the next start: ${(error as Error).message}`);
  }
  return manifest;
}
