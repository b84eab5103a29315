import configuration from "../deno.json" with { type: "json" };

/** The version of Lutra. */
export const LUTRA_VERSION: string = configuration.version;

/**
 * The version of the kernels' C ABI, and of what they compute: stages of one pipeline must give the same bits, so workers of
 * another version are refused. `kernels/src/ffi.rs` has it too.
 */
export const ABI_VERSION = 4;
