#if !defined(__x86_64__)
#error "the emulator switches fibers with x86-64 instructions"
#endif

// dflare_switch_stack of fiber.h: all callee-saved registers live on the stack that is left.
asm(R"(
.text
.globl dflare_switch_stack
.hidden dflare_switch_stack
dflare_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
