# The CUDA backend's sources and libraries, added to the layers that use them (see cuda.cmake).
if(NOT MOE_WITH_CUDA)
  return()
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/kernels/cuda/*.cu)
if(NOT "90a" IN_LIST MOE_CUDA_BUILT)
  list(FILTER cuda_sources EXCLUDE REGEX "sm90")
endif()
target_sources(moe_kernels PRIVATE ${cuda_sources})
target_compile_definitions(moe_kernels PRIVATE MOE_WITH_CUDA)
target_link_libraries(moe_kernels PUBLIC CUDA::cudart CUDA::cublasLt)
target_compile_options(moe_kernels PRIVATE
  "$<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra,-Wshadow;$<$<BOOL:${MOE_WERROR}>:-Werror=all-warnings>>")

# Random numbers: the same bits everywhere.
set_source_files_properties(${CMAKE_SOURCE_DIR}/kernels/cuda/draw.cu PROPERTIES COMPILE_OPTIONS -fmad=false)

# The Hopper expert kernels exist where 90a code is built.
if("90a" IN_LIST MOE_CUDA_BUILT AND EXISTS ${CMAKE_SOURCE_DIR}/kernels/cuda/experts_sm90.cu)
  target_compile_definitions(moe_kernels PRIVATE MOE_WITH_SM90A)
endif()
if(MOE_WITH_CUDNN)
  target_sources(moe_kernels PRIVATE ${CMAKE_SOURCE_DIR}/kernels/cuda/attention_cudnn.cpp)
  target_compile_definitions(moe_kernels PRIVATE MOE_WITH_CUDNN)
  target_include_directories(moe_kernels SYSTEM PRIVATE
    ${MOE_CUDNN_FRONTEND_INCLUDE} ${MOE_CUDNN_INCLUDE})
  target_link_libraries(moe_kernels PUBLIC ${MOE_CUDNN_LIBRARY} CUDA::nvrtc) # the frontend refers to it
endif()
if(MOE_WITH_NCCL)
  target_compile_definitions(moe_parallel PRIVATE MOE_WITH_NCCL)
  target_include_directories(moe_parallel SYSTEM PRIVATE ${MOE_NCCL_INCLUDE})
  target_link_libraries(moe_parallel PUBLIC ${MOE_NCCL_LIBRARY} CUDA::cudart)
endif()
