/** Base of this folder's errors. */
export class ModelError extends Error {
  override readonly name: string = "ModelError";
}

/** A file is no valid GGUF. */
export class GgufError extends ModelError {
  override readonly name = "GgufError";
  /** The field that is wrong. */
  readonly field: string;
  /** Byte offset in the file. */
  readonly offset: number;

  constructor(field: string, offset: number, message: string, options?: ErrorOptions) {
    super(`${field} (at byte ${offset}): ${message}`, options);
    this.field = field;
    this.offset = offset;
  }
}

/** A file is no valid safetensors. */
export class SafetensorsError extends ModelError {
  override readonly name = "SafetensorsError";
  /** What is wrong: the header, or a tensor. */
  readonly field: string;

  constructor(file: string, field: string, message: string, options?: ErrorOptions) {
    super(`${file}: ${field} ${message}`, options);
    this.field = field;
  }
}

/** The file is valid, but Lutra cannot run this model. */
export class UnsupportedModelError extends ModelError {
  override readonly name = "UnsupportedModelError";
}

/** The model's vocabulary cannot be used. */
export class TokenizerError extends ModelError {
  override readonly name = "TokenizerError";
}

/** A chat template failed. */
export class ChatTemplateError extends ModelError {
  override readonly name = "ChatTemplateError";
}
