// Copying, also where the browser keeps its clipboard from pages that do not come over https or from this computer.

/** Copy a text, and say so on the button for a moment. */
export async function copy(text, button, labels) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  button.textContent = labels.copied;
  setTimeout(() => (button.textContent = labels.copy), 1500);
}
