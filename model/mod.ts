/**
 * What a model file says: GGUF, hyper-parameters, tokenizer, chat template.
 *
 * {@linkcode loadModel} reads everything but the weights, which the kernels map themselves. Files are hostile until checked;
 * what comes out is typed. Nothing here knows workers or HTTP.
 *
 * @module
 */
export * from "./architecture.ts";
export { ARCHITECTURES } from "./architectures/mod.ts";
export * from "./catalogue.ts";
export * from "./chat_template.ts";
export * from "./description.ts";
export * from "./errors.ts";
export * from "./ggml_types.ts";
export * from "./gguf.ts";
export * from "./hugging_face.ts";
export * from "./hugging_face_tokenizer.ts";
export * from "./load.ts";
export * from "./safetensors.ts";
export * from "./sketch.ts";
export * from "./stop_matcher.ts";
export * from "./stream_decoder.ts";
export * from "./tokenizer.ts";
export * from "./tool_calls.ts";
export * from "./vocabulary.ts";
