import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { identityOf, replaceFile } from "./chunk_file.ts";
import { WeightsError } from "./errors.ts";
import { hashFile, Manifest } from "./manifest.ts";

/** Where a manifest's hashes are kept. */
function pathOf(cache: string, key: string): string {
  return join(cache, "manifests", key);
}

/** The manifest of this root, if it is kept: what is damaged has another root, and is not. */
export async function keptManifest(cache: string, root: string, bytes: number): Promise<Manifest | undefined> {
  try {
    const manifest = new Manifest(bytes, Uint8Array.from(await readFile(pathOf(cache, root))));
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
 * The manifest of a file on this device: hashed once, and again when the file is another.
 *
 * @param onProgress Told how much is hashed, 0 to 1.
 * @throws {WeightsError} when the file cannot be read.
 */
export async function manifestOf(
  path: string,
  cache: string,
  { onProgress, log = console.warn }: { onProgress?: (fraction: number) => void; log?: (message: string) => void } = {},
): Promise<Manifest> {
  let identity: string;
  try {
    identity = await identityOf(path);
  } catch (cause) {
    throw new WeightsError(`${path} cannot be read: ${(cause as Error).message}`, { cause });
  }
  const bytes = Number(identity.split(" ")[2]);
  const key = pathOf(cache, `of-${createHash("sha256").update(`${identity} ${resolve(path)}`).digest("hex")}`);
  const root = await readFile(key, "utf8").catch(() => "");
  const known = /^[0-9a-f]{64}$/.test(root) ? await keptManifest(cache, root, bytes) : undefined;
  if (known !== undefined) return known;
  const manifest = await hashFile(path, onProgress);
  try {
    await keepManifest(cache, manifest);
    if (await identityOf(path) === identity) await replaceFile(key, manifest.root);
  } catch (error) {
    log(`the hashes of ${path} are not kept for the next start: ${(error as Error).message}`);
  }
  return manifest;
}
